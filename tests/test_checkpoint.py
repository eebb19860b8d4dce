"""Checkpoints: in every form that people have them, and a clear refusal for everything else."""

import argparse
import datetime
import errno
import hashlib
import http.client
import io
import json
import os
import pathlib
import pickle
import re
import types
import unittest.mock
import urllib.error
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_runstate import mutations

import checkpoint
import models
from models import TITLES, build
from util import files, runstate
from util.runtime import UserError
from zoo import library_models

HINT = "make it with: python train.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each network, of 10 classes."""
    folder, paths = tmp_path_factory.mktemp("saved"), {}
    for kind in ("teacher", "student", "feature_student"):
        paths[kind] = folder / f"{kind}.pth"
        checkpoint.save(build(kind, 10), paths[kind])
    return paths


def state_of(path):
    return torch.load(path, weights_only=True)


def read(path, kind=None):
    """What is in the file; nothing travels with it."""
    state, about = checkpoint.read(Path(path), HINT, kind)
    assert about is None
    return state


def load(path, kind="student", classes=10):
    return checkpoint.load(build(kind, classes), kind, Path(path), HINT)


def refused(path, match, kind="student", classes=10):
    """The message of the refusal, which leaves the network as it was."""
    network = build(kind, classes)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=match) as error:
        checkpoint.load(network, kind, Path(path), HINT)
    assert "\n" not in str(error.value)
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_round_trip(tmp_path, scaled_like_trained):
    network = scaled_like_trained(build("feature_student", 10)).to(memory_format=torch.channels_last)
    checkpoint.save(network, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", "feature_student").state_dict()
    assert all(value.equal(loaded[key]) for key, value in network.state_dict().items())


def test_a_checkpoint_is_a_plain_state_dict(saved):
    state = {key: value for key, value in state_of(saved["feature_student"]).items() if not key.startswith("proj.")}
    plain = torchvision.models.resnet18(num_classes=10)
    plain.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.load_state_dict(state)


def test_a_checkpoint_ends_in_its_checksum_and_any_reader_takes_it(saved):
    content = saved["student"].read_bytes()
    seal = b"sha256:" + hashlib.sha256(content[:-71]).hexdigest().encode()
    assert content[-71:] == seal
    with zipfile.ZipFile(saved["student"]) as archive:
        assert archive.comment == seal and archive.testzip() is None
    given = read(saved["student"])
    for options in ({}, {"mmap": True}):
        plain = torch.load(saved["student"], weights_only=True, **options)
        assert plain.keys() == given.keys() and all(value.equal(given[key]) for key, value in plain.items())


def test_equal_weights_make_equal_files(tmp_path):
    network = build("student", 10)
    checkpoint.save(network, tmp_path / "a.pth")
    checkpoint.save(network, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_the_older_layout_loads_to_the_same_outputs(tmp_path, scaled_like_trained):
    network = scaled_like_trained(build("feature_student", 10)).eval()
    body = [network.conv1, network.bn1, network.relu, network.maxpool]
    body += [network.layer1, network.layer2, network.layer3, network.layer4]
    older = torch.nn.ModuleDict({"base": torch.nn.Sequential(*body), "fc": network.fc, "proj": network.proj})
    torch.save(older.state_dict(), tmp_path / "old.pth")
    assert "base.7.1.bn2.running_var" in older.state_dict()
    images = torch.randn(2, 3, 16, 16)
    expected, given = network(images), load(tmp_path / "old.pth", "feature_student").eval()(images)
    assert given.logits.equal(expected.logits) and given.projected.equal(expected.projected)


ABOUT = {
    "classes": ["a", "\udcff\n\u00e9"],
    "image_size": 32,
    "mean": (0.5, 0.25, 1),
    "std": [0.1, 0.2, 0.3],
    "stem": "small",
    "network": "student",
    "notes": {"seed": None},
}


def test_what_travels_with_a_checkpoint(tmp_path, tiny):
    path = tmp_path / "a.pth"
    checkpoint.save(tiny, path, ABOUT)
    state, about = checkpoint.read(path, HINT)
    assert about == {**ABOUT, "mean": [0.5, 0.25, 1]} and state["weight"].equal(tiny.weight)
    with open(path, "rb") as file:
        for source, options in [(path, {}), (path, {"mmap": True}), (str(path), {}), (file, {})]:
            plain = torch.load(source, weights_only=True, **options)
            assert plain.keys() == state.keys() and all(value.equal(state[key]) for key, value in plain.items())
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("archive/about.json")) == about and archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(path.read_bytes()[:-71]).hexdigest().encode()
    checkpoint.save(tiny, tmp_path / "b.pth", ABOUT)
    assert (tmp_path / "b.pth").read_bytes() == path.read_bytes()


def with_about(**changes):
    """The text of an about.json that is as it ought to be, but for these values; MISSING removes one."""
    return json.dumps({key: value for key, value in {**ABOUT, **changes}.items() if value is not MISSING}).encode()


MISSING = object()
HUGE = 10**400
NO_ABOUT = {
    "classes": ("abc", [1], {"a": 1}, None, [], ["a", "a"], ["a", "b" * 2001], [["a"]], MISSING),
    "image_size": (0, 32.5, 32.0, True, "32", -1, 70_000, HUGE, MISSING),
    "mean": (0.5, [0.5, 0.5], ["0", "0", "0"], [0, 0, float("nan")], [1e308] * 3, [HUGE] * 3, [True] * 3, MISSING),
    "std": ([1, 1, 0], [1, 1, -1], [1, 1, float("inf")], [1e-320] * 3, [1e308] * 3, [[1]] * 3, MISSING),
    "stem": (3, "tiny", []),
    "network": ([], "a+b+c", "x" * 2001, MISSING),
    "job": (3,),
    "run": ([1], "x", None),
    "notes": (float("nan"), float("-inf")),
}


@pytest.mark.parametrize(
    "text",
    [
        *(b"{", b"[]", b"\xff", b"[" * 100_000, b'{"notes": 1e999}'),
        *(with_about(**{key: value}) for key, values in NO_ABOUT.items() for value in values),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("seal", [bytes, lambda content: sealed_anew(content)])
def test_what_travels_with_a_checkpoint_is_checked(tmp_path, tiny, text, seal):
    checkpoint.save(tiny, tmp_path / "a.pth")
    content = rezipped((tmp_path / "a.pth").read_bytes(), lambda archive: archive.writestr("archive/about.json", text))
    (tmp_path / "x.pth").write_bytes(seal(content))
    with pytest.raises(UserError, match="x.pth is damaged"):
        checkpoint.read(tmp_path / "x.pth", HINT)


def test_nothing_is_written_that_could_not_be_read(tmp_path, tiny):
    with pytest.raises(ValueError, match="about.json"):
        checkpoint.save(tiny, tmp_path / "a.pth", {**ABOUT, "classes": "abc"})
    assert not os.listdir(tmp_path)


def test_missing(tmp_path):
    refused(tmp_path / "no.pth", "no.pth does not exist; make it with: python train.py")


def test_a_folder(tmp_path):
    refused(tmp_path, "cannot read .*directory")


def test_a_file_without_the_right_to_read_it(tmp_path, monkeypatch):
    def fail(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "x.pth").touch()
    monkeypatch.setattr(Path, "read_bytes", fail)
    refused(tmp_path / "x.pth", "cannot read .*x.pth: Permission denied")


@pytest.mark.parametrize("length", [1, 100, 10_000, 1_000_000, -1, -71, -100, -20_000])
def test_truncated(saved, tmp_path, length):
    (tmp_path / "cut.pth").write_bytes(saved["student"].read_bytes()[:length])
    refused(tmp_path / "cut.pth", "cut.pth is damaged")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 1])
def test_one_bit_flipped(saved, tmp_path, part):
    content = bytearray(saved["student"].read_bytes())
    content[int(part * (len(content) - 1))] ^= 4
    (tmp_path / "flipped.pth").write_bytes(content)
    refused(tmp_path / "flipped.pth", "flipped.pth is damaged")


def read_mutants(content, path):
    """What each mutant of a file of that path reads as, None for a refusal; nothing else may come of it."""
    path.touch()
    for mutant in mutations(content, 3000):
        try:
            with unittest.mock.patch.object(Path, "read_bytes", lambda self, mutant=mutant: mutant):
                state, _ = checkpoint.read(path, HINT)
        except UserError as error:
            assert re.match(f"{re.escape(str(path))} .*", str(error)).end() == len(str(error))  # its name, on one line
            state = None
        yield state


@pytest.fixture
def tiny():
    """A network of a file so small that most of it is structure."""
    return torch.nn.Linear(6, 9)


def test_any_damage_to_a_checkpoint_is_refused(tmp_path, tiny):
    checkpoint.save(tiny, tmp_path / "a.pth", ABOUT)
    assert not any(read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth"))


def test_damage_to_a_file_from_elsewhere_is_refused_or_harmless(tmp_path, tiny):
    state = tiny.state_dict()
    torch.save(state, tmp_path / "a.pth")
    sound = [given for given in read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth") if given]
    assert 0 < len(sound) < 600  # there is padding
    assert all(given.keys() == state.keys() for given in sound)
    assert all(value.equal(state[key]) for given in sound for key, value in given.items())


@pytest.mark.filterwarnings("ignore")  # torch's, of pickles of other protocols
def test_damage_to_a_file_in_the_older_format_never_crashes(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    states = list(read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth"))
    assert any(state is None for state in states) and any(states)


def rezipped(content, change=lambda archive: None, **options):
    """The zip file's members in another one, to which `change` may add."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w", **options) as copy:
        for member in archive.infolist():
            copy.writestr(member.filename, archive.read(member))
        change(copy)
    return buffer.getvalue()


def mark_as_folders(archive):
    for member in archive.filelist:
        member.external_attr |= 0x10


def test_a_member_marked_as_a_folder_reads_as_it_is(tmp_path, tiny):
    """torch takes whatever is in the memory for it, and says nothing."""
    torch.save(tiny.state_dict(), tmp_path / "a.pth")
    (tmp_path / "x.pth").write_bytes(rezipped((tmp_path / "a.pth").read_bytes(), mark_as_folders))
    given = read(tmp_path / "x.pth")
    assert all(value.equal(given[key]) for key, value in tiny.state_dict().items())


def overlap(archive):
    """Add a large member, and another one that lies within it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as other:
        other.writestr("archive/inner", bytes(10_000))
    archive.writestr("archive/outer", buffer.getvalue())
    inner, outer = other.getinfo("archive/inner"), archive.getinfo("archive/outer")
    inner.header_offset = outer.header_offset + len(outer.FileHeader())
    archive.filelist.append(inner)


def sealed_anew(content):
    """With a checksum that fits."""
    content = content[:-2] + (71).to_bytes(2, "little")
    return content + b"sha256:" + hashlib.sha256(content).hexdigest().encode()


@pytest.mark.parametrize("seal", [bytes, sealed_anew])
@pytest.mark.parametrize(
    "change, options",
    [
        (lambda archive: None, {"compression": zipfile.ZIP_DEFLATED}),
        (overlap, {}),
        (lambda archive: archive.writestr("archive/data/0", bytes(4 * 6 * 9)), {}),
        (lambda archive: archive.writestr("archive/more/", b""), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_file_that_torch_does_not_write(tmp_path, tiny, change, options, seal):
    checkpoint.save(tiny, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(seal(rezipped(content)))
    assert read(tmp_path / "x.pth").keys() == {"weight", "bias"}
    (tmp_path / "x.pth").write_bytes(seal(rezipped(content, change, **options)))
    refused(tmp_path / "x.pth", "x.pth is damaged")


@pytest.mark.parametrize(
    "content", [b"\x80\x02garbage", bytes(range(255, 99, -1)) * 9, b"PK\x03\x04" + bytes(100), b"text\n" * 99]
)
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", "x.pth is damaged")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, write):
    write({"conv1.weight": Touch(tmp_path / "ran")}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "could run code: refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {"epoch": 3},
        {},
        torch.zeros(3),
        {"model": {"epoch": 3, "loss": torch.tensor(0.5)}},
        {"a": {"b": {"c": {"too deep": torch.zeros(1)}}}},
        {"weight": torch.zeros(2), "mode": "train"},
        {1: 2},
        {1: torch.zeros(1)},
        {"two\nlines": torch.zeros(1)},
        {"\udc80": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("seal", [bytes, lambda content: sealed_anew(content)])
def test_not_a_state_dict(tmp_path, value, seal):
    torch.save(value, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(seal((tmp_path / "x.pth").read_bytes()))
    with pytest.raises(UserError, match="is not a state_dict") as error:
        read(tmp_path / "x.pth")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "holds, needed, message",
    [
        ("teacher", "student", "holds a ResNet-50, not the ResNet-18 needed"),
        ("student", "teacher", "holds a ResNet-18, not the ResNet-50"),
        ("student", "feature_student", "holds a ResNet-18, not the ResNet-18 with a projector"),
    ],
)
def test_another_architecture(saved, holds, needed, message):
    refused(saved[holds], message, needed)


@pytest.mark.parametrize("name", ["resnet34", "squeezenet1_1"])
def test_another_family(tmp_path, name):
    torch.save(getattr(torchvision.models, name)(num_classes=10).state_dict(), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds a network of another kind, not")


def test_another_number_of_classes(saved):
    refused(saved["student"], "tells 10 classes apart, the data set has 100", classes=100)


def test_another_stem(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"conv1.weight has the shape \(64, 3, 7, 7\), not \(64, 3, 3, 3\)")


def test_a_network_for_images_of_other_channels_or_another_size(tmp_path):
    state = build("resnet20", 4).state_dict()
    torch.save({**state, "conv1.weight": state["conv1.weight"][:, :1]}, tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"grey.pth is for images of 1 channels \(conv1.weight\), images here have 3"):
        checkpoint.load(build("resnet20", 4), "resnet20", tmp_path / "grey.pth", HINT)
    shape = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16, "num_classes": 4}
    large, small = (torchvision.models.VisionTransformer(image_size=side, **shape) for side in (48, 32))
    with pytest.raises(UserError, match="x.pth is for images of 48x48 pixels, the network here for 32x32"):
        checkpoint.fit_into(small, large.state_dict(), Path("x.pth"))
    at_size = checkpoint._at_the_size(small, large.state_dict(), Path("x.pth"))  # as a start may be
    checkpoint.fit_into(small, at_size, Path("x.pth"))
    positions, before = small.encoder.pos_embedding, large.encoder.pos_embedding
    assert positions.shape == (1, 17, 16) and positions[:, 0].equal(before[:, 0])


def test_missing_and_surplus_keys(saved, tmp_path):
    state = state_of(saved["student"])
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "has extra.weight besides")
    del state["layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "lacks layer2.0.bn1.weight")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("fc.bias", torch.zeros(()), "tells 1 classes apart"),
        ("fc.bias", torch.zeros(5, 2), r"fc.bias has the shape \(5, 2\), not \(10,\)"),
        ("fc.weight", torch.zeros(10, 512).expand(10**12, 10, 512), "fc.weight has the shape"),
        ("fc.bias", torch.zeros(10, dtype=torch.int64), "fc.bias is of torch.int64, not torch.float32"),
        ("fc.bias", torch.zeros(10, dtype=torch.complex64), "fc.bias is of torch.complex64"),
        ("fc.bias", torch.zeros(10, dtype=torch.bool), "fc.bias is of torch.bool"),
        ("bn1.num_batches_tracked", torch.tensor(1.5), "bn1.num_batches_tracked is of torch.float32, not torch.int64"),
    ],
)
def test_a_tensor_that_does_not_fit(saved, tmp_path, key, value, message):
    torch.save({**state_of(saved["student"]), key: value}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.zeros(10).to_sparse(), "fc.bias is sparse"),
        (lambda: torch.zeros(10, device="meta"), "fc.bias is without its data"),
        (lambda: torch.nested.nested_tensor([torch.zeros(4), torch.zeros(6)]), "fc.bias is nested"),
        (lambda: torch.quantize_per_tensor(torch.zeros(10), 1.0, 0, torch.qint8), "fc.bias is of torch.qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # some of these are prototypes, some deprecated
def test_a_tensor_of_another_kind(saved, tmp_path, make, message):
    torch.save({**state_of(saved["student"]), "fc.bias": make()}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


class Hiding:
    """Pickled as an OrderedDict with attributes that hide its methods."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), {"items": 1, "keys": 1, "values": 1}, None, iter(self.state.items())


def test_attributes_in_a_file_hide_no_methods(saved, tmp_path):
    state = state_of(saved["student"])
    state["fc.bias"] = torch.nn.Parameter(state["fc.bias"])
    for name in ("copy_", "dim", "equal", "numel", "to"):
        setattr(state["fc.bias"], name, 1)
    torch.save(Hiding(state), tmp_path / "x.pth")
    plain = torch.load(tmp_path / "x.pth", weights_only=True)
    assert plain.items == 1 and plain["fc.bias"].copy_ == 1
    assert all(value.equal(state[key]) for key, value in load(tmp_path / "x.pth").state_dict().items())


def test_weights_may_be_parameters_or_of_another_precision(saved, tmp_path):
    state = state_of(saved["student"])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        bias = torch.nn.Parameter(torch.full((10,), 0.5, dtype=dtype))
        torch.save({**state, "fc.bias": bias}, tmp_path / "x.pth")
        loaded = load(tmp_path / "x.pth").state_dict()
        assert (loaded["fc.bias"] == 0.5).all() and loaded["fc.weight"].equal(state["fc.weight"])


@pytest.mark.parametrize(
    "value, named", [(torch.nan, "NaN"), (torch.inf, "inf"), (torch.tensor(1e300, dtype=torch.float64), "inf")]
)
def test_a_training_that_diverged(tmp_path, tiny, value, named):
    torch.save({"weight": torch.zeros(9, 6), "bias": torch.zeros(9).double() + value}, tmp_path / "x.pth")
    before = copy_of(tiny)
    with pytest.raises(UserError, match=f"x.pth holds {named} in bias: its training diverged; use another"):
        checkpoint.load(tiny, "mine", tmp_path / "x.pth", HINT)
    assert all(value.equal(before[key]) for key, value in tiny.state_dict().items())


# as people have them


@pytest.fixture(scope="module")
def names():
    """For each kind of network a state_dict of its names, with tensors that are small and all different."""

    def small(kind, start):
        with torch.device("meta"):
            keys = build(kind, 10).state_dict()
        return {key: torch.full((2,), float(start + i)) for i, key in enumerate(keys)}

    return {kind: small(kind, 1000 * i) for i, kind in enumerate(TITLES)}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def reads_as(path, content, state, kind=None, **options):
    """Whether a file of that content is read as the state_dict and nothing else."""
    torch.save(content, path, **options)
    given = read(path, kind)
    return given.keys() == state.keys() and all(value.equal(given[key]) for key, value in state.items())


BESIDE = {
    "epoch": 3,
    "arch": "resnet18",
    "best_acc1": torch.tensor(71.2),
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    "scheduler": {"last_epoch": 3, "_last_lr": [0.1]},
    "rng": {"torch": torch.get_rng_state()},
}


@pytest.mark.parametrize("name", [*checkpoint.WRAPPERS, "my_weights"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped(tmp_path, names, name, prefix, capsys):
    state = names["student"]
    assert reads_as(tmp_path / "x.pth", {**BESIDE, name: prefixed(state, prefix)}, state)
    assert reads_as(tmp_path / "x.pth", {"checkpoint": {**BESIDE, name: prefixed(state, prefix)}}, state)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "net.",
        "backbone.",
        "encoder.",
        "student.",
        "any name.",
        "module._orig_mod.0.",
    ],
)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_prefixed(tmp_path, names, tiny, prefix, options):
    for state in (names["student"], names["teacher"], tiny.state_dict()):
        assert reads_as(tmp_path / "x.pth", prefixed(state, prefix), state, **options)


def test_the_older_layout_wrapped_and_prefixed(tmp_path, names):
    state, older = names["feature_student"], {new: old for old, new in checkpoint.LEGACY_PREFIXES.items()}
    old = {re.sub(r"^\w+\.", lambda found: older.get(found[0], found[0]), key): value for key, value in state.items()}
    assert old["base.0.weight"].equal(state["conv1.weight"]) and "layer1.0.conv1.weight" not in old
    assert reads_as(tmp_path / "x.pth", {**BESIDE, "net": prefixed(old, "module.")}, state)


@pytest.mark.parametrize(
    "content, kind, taken",
    [
        (lambda s, t: {"student": s, "teacher": t}, "teacher", "teacher"),
        (lambda s, t: {"student": s, "teacher": t}, "student", "student"),
        (lambda s, t: {"teacher": t, "student": s}, None, "student"),
        (lambda s, t: {"model_ema": t, "model": s}, None, "model"),
        (lambda s, t: {"ema": prefixed(t, "module."), "state_dict": prefixed(s, "module.")}, None, "state_dict.module"),
        (lambda s, t: {"mine": s, "ema": {"bias": torch.zeros(3)}}, None, "mine"),
        (lambda s, t: {**prefixed(s, "student."), **prefixed(t, "teacher.")}, "teacher", "teacher"),
        (lambda s, t: {"state_dict": {**s, **prefixed(t, "teacher.")}}, "student", "state_dict"),
    ],
)
def test_of_several_networks_the_one_that_fits_is_taken(tmp_path, names, content, kind, taken, capsys):
    student, teacher = names["student"], names["teacher"]
    state = teacher if taken == "teacher" else student
    assert reads_as(tmp_path / "x.pth", content(student, teacher), state, kind)
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "several sets of weights" in err
        and re.search(f": taking {taken}; --weights_key NAME", err)
    )


@pytest.mark.parametrize("row", ["student", "teacher"])
def test_of_several_networks_a_row_has_its_own(tmp_path, names, row):
    torch.save({"student": names["student"], "teacher": names["teacher"]}, tmp_path / "x.pth")
    assert checkpoint.network_in(tmp_path / "x.pth", row=row) == row
    torch.save(names["student"], tmp_path / "x.pth")
    assert checkpoint.network_in(tmp_path / "x.pth", row=row) == "student"


def test_of_several_networks_none_is_guessed(tmp_path, names):
    torch.save({"one": names["student"], "two\n": names["student"]}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match="holds several sets of weights .*: choose one with --weights_key NAME"
    ) as error:
        read(tmp_path / "x.pth", "student")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("key, taken", [("ema", 1), ("ema.module", 1), ("state_dict", 0), ("module", 0), ("no", None)])
def test_the_set_of_weights_that_is_asked_for(tmp_path, key, taken, capsys):
    states = [build("resnet20", 4).state_dict() for _ in range(2)]
    torch.save(
        {"state_dict": prefixed(states[0], "module."), "ema": prefixed(states[1], "module.")}, tmp_path / "x.pth"
    )
    if taken is None:
        with pytest.raises(UserError, match=f"--weights_key {key}: .* state_dict.module, ema.module"):
            checkpoint.read(tmp_path / "x.pth", HINT, "resnet20", key)
        return
    state, _ = checkpoint.read(tmp_path / "x.pth", HINT, "resnet20", key)
    assert state.keys() == states[taken].keys() and state["fc.weight"].equal(states[taken]["fc.weight"])
    assert "taking " in capsys.readouterr().err


def renamed(state, body, head, last="fc."):
    """The state_dict with other names: a prefix of the body, and the last layer's."""
    return {head + k.removeprefix(last) if k.startswith(last) else body + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    "name, other, last",
    [
        ("resnet20", "resnet56", "fc."),
        ("resnet56", "resnet20", "fc."),
        ("wrn_16_2", "vgg8", "fc."),
        ("resnet34", "mobilenet_v2", "fc."),
        ("mobilenet_v3_small", "resnet18", "classifier.3."),
        ("squeezenet1_1", "resnet18", "classifier.1."),
        ("student", "teacher", "fc."),
    ],
)
def test_a_network_is_found_by_its_names(tmp_path, name, other, last, capsys):
    """Whatever lies around it: of mdistiller, mmpretrain, lightning, and a classifier of one's own."""
    state, others = (
        library_models.layers(kind, 4, "standard").state_dict()
        if kind in library_models.names() and kind not in models.ROWS_OWN
        else build(kind, 4).state_dict()
        for kind in (name, other)
    )
    both = {**prefixed(state, "module.student."), **prefixed(others, "module.teacher.")}
    for content in (
        {"model": both, "epoch": 3},
        {"model": {**both, "module.embed.linear.weight": torch.zeros(4, 4)}, "epoch": 3},
        {"meta": {"epoch": 3}, "state_dict": renamed(state, "backbone.", "head.fc.", last)},
        {"state_dict": {**prefixed(state, "model."), **prefixed(others, "teacher.")}, "epoch": 3},
        {"state_dict": renamed(state, "net.backbone.", "net.classification_head.", last)},
        {"state_dict": renamed(state, "backbone.", "head.fc.", last) | {"data_preprocessor.mean": torch.ones(3, 1, 1)}},
        {"model": both | {"module.conv_reg.0.weight": torch.ones(3, 4), "module.connectors.0.weight": torch.ones(9)}},
        renamed(state, "", "linear.", last),
    ):
        assert reads_as(tmp_path / "x.pth", content, state, name), capsys.readouterr().err


def with_counters(state):
    layers = {key.rpartition(".")[0] for key in state}
    counters = ("total_ops", "total_params")
    return {**state, **{f"{layer}.{name}": torch.zeros(1).double() for layer in layers for name in counters}}


@pytest.mark.parametrize(
    "change",
    [
        with_counters,
        lambda state: {**state, "total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
        lambda state: {**prefixed(state, "model."), "criterion.weight": torch.ones(10), "loss_fn.pos": torch.ones(3)},
        lambda state: {**prefixed(with_counters(state), "module."), "total_ops": torch.zeros(1)},
        lambda state: {**prefixed(state, "net."), "ce_loss.weight": torch.ones(10), "val_f1.tp": torch.ones(3)},
        lambda state: {**prefixed(state, "module.net."), "module.criterion.weight": torch.ones(10)},
        lambda state: {**state, "epoch": 3, "best_acc": torch.tensor(0.5), "arch": "resnet18", "optimizer": BESIDE},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ],
)
def test_bookkeeping_may_be_there_or_lack(saved, tmp_path, change):
    state = {key: value + 3 for key, value in state_of(saved["student"]).items()}
    changed = change(state)
    torch.save(changed, tmp_path / "x.pth")
    tracked = any("num_batches_tracked" in key for key in changed)
    for key, value in load(tmp_path / "x.pth").state_dict().items():
        assert value.equal(state[key] if tracked or "num_batches_tracked" not in key else torch.tensor(0)), key


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
@pytest.mark.parametrize("extra", ["normalize.mean", "proj2.weight", "loss2.weight", "fc2.total", "ema"])
def test_weights_that_are_none_of_the_network_s_are_never_left_out(saved, tmp_path, prefix, extra):
    state = {**prefixed(state_of(saved["student"]), prefix), extra: torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", f"does not fit the network: it has {extra} besides")


PLAIN = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"), nested=argparse.Namespace(a=[1, {"b": 2}])),
    "settings": types.SimpleNamespace(lr=0.1),
    "path": Path("x"),
    "best": np.float64(71.2),
    "best32": np.float32(71.2),
    "count": np.int64(3),
    "flag": np.bool_(True),
    "curve": np.arange(5),
    "dtype": np.dtype("float32"),
    "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "took": datetime.timedelta(3),
    "history": defaultdict(list, {"loss": [1, 2]}),
    "more": defaultdict(dict, {"a": defaultdict(int)}),
    "last": deque([1, 2], 5),
    "counts": Counter("aab"),
    "size": torch.Size([1, 2]),
    "sets": ({1}, frozenset({1})),
}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_of_known_types_beside_the_weights(tmp_path, tiny, name, options):
    state = tiny.state_dict()
    assert reads_as(tmp_path / "x.pth", {name: PLAIN[name], "model": state}, state, **options)


def test_weights_in_a_dict_of_another_type(tmp_path, tiny):
    state = tiny.state_dict()
    assert reads_as(tmp_path / "x.pth", defaultdict(None, {"model": defaultdict(list, state)}), state)
    assert not set(checkpoint.STAND_INS) & set(torch.serialization.get_safe_globals())


class Namespace(argparse.Namespace):
    """Pickled as argparse's own, made and filled as the file likes."""

    def __init__(self, arguments, state):
        self.__dict__.update(arguments=arguments, state=state)

    def __reduce__(self):
        return argparse.Namespace, self.arguments, self.state


@pytest.mark.parametrize("arguments", [(), (1, 2), ({"a": 1},)])
@pytest.mark.parametrize(
    "state", [{"__class__": 1, "__dict__": 2, "__setstate__": 3, "a": 4}, (None, {"a": 1, "__class__": 2}), [1], "a"]
)
def test_a_namespace_changes_nothing(tmp_path, tiny, arguments, state):
    attributes = dict(vars(argparse.Namespace))
    weights = tiny.state_dict()
    assert reads_as(tmp_path / "x.pth", {"args": Namespace(arguments, state), "model": weights}, weights)
    assert dict(vars(argparse.Namespace)) == attributes


@pytest.mark.parametrize("place", ["args", "inside", "arguments", "beside"])
def test_code_beside_the_weights_is_not_run(tmp_path, tiny, place):
    evil = Touch(tmp_path / "ran")
    values = {
        "args": evil,
        "inside": argparse.Namespace(lr=evil),
        "arguments": Namespace((evil,), {}),
        "beside": [np.float64(1), evil],
    }
    torch.save({"model": tiny.state_dict(), "args": values[place]}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", "holds more than tensors .* could run code: refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 3}])
def test_a_whole_model(tmp_path, tiny, wrap, options):
    torch.save(wrap(torch.nn.Sequential(tiny)), tmp_path / "x.pth", **options)
    refused(tmp_path / "x.pth", "holds a whole model, which could run code: refused. Save model.state_dict")


def test_an_object_beside_the_weights_is_named(tmp_path, tiny):
    torch.save({"model": tiny.state_dict(), "criterion": torch.nn.CrossEntropyLoss()}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"\(torch.nn.modules.loss.CrossEntropyLoss\) and could run code")


def test_lightning(tmp_path, names):
    state = names["student"]
    content = {
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(10)},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.7)}},
        "optimizer_states": [BESIDE["optimizer"]],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(a=1)},
    }
    assert reads_as(tmp_path / "x.ckpt", content, {**state, "criterion.weight": torch.ones(10)})


class Wrapping(torch.nn.Module):
    """A network of a user's own, all of it under one name, with names that elsewhere are no weights."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.model.criterion = torch.nn.Linear(3, 1)


@pytest.mark.parametrize("prefix", ["", "module.", "net.model."])
def test_a_network_of_one_s_own(tmp_path, prefix):
    torch.manual_seed(1)
    network, path = Wrapping(), tmp_path / "x.pth"
    checkpoint.save(network, path)
    assert read(path).keys() == network.state_dict().keys()
    torch.save(prefixed(network.state_dict(), prefix), tmp_path / "y.pth")
    for each in (path, tmp_path / "y.pth"):
        loaded = checkpoint.load(Wrapping(), "mine", each, HINT).state_dict()
        assert all(value.equal(loaded[key]) for key, value in network.state_dict().items())
    averaged = torch.optim.swa_utils.AveragedModel(network)
    torch.save({**averaged.state_dict(), "total_ops": torch.ones(1)}, tmp_path / "z.pth")
    checkpoint.load(Wrapping(), "mine", tmp_path / "z.pth", HINT)
    state = network.state_dict()
    del state["model.criterion.bias"]
    torch.save(prefixed(state, prefix), path)
    with pytest.raises(UserError, match="it lacks model.criterion.bias"):
        checkpoint.load(Wrapping(), "mine", path, HINT)
    with pytest.raises(UserError, match="x.pth does not fit the network: it lacks bias"):
        checkpoint.load(torch.nn.Linear(2, 2), "mine", path, HINT)


def test_a_student_is_not_a_network_of_one_s_own(saved):
    with pytest.raises(UserError, match="holds a ResNet-18, not the mine needed here"):
        checkpoint.load(Wrapping(), "mine", saved["student"], HINT)


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"<HTML><head></head></HTML>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-lfs pointer .* git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:\xff\x01", "an ONNX model"),
        (b"\x08\x01\x12\xff\x01", "a TensorFlow model"),
        (b"\n\x1c\n\x05input\x12\x0bPlaceholder", "a TensorFlow model"),
        (b"\x1f\x8b\x08" + bytes(99), "a compressed file"),
        (b"\xfd7zXZ\0" + bytes(99), "a compressed file"),
        (b"model.pth".ljust(257, b"\0") + b"ustar\x0000" + bytes(999), "a tar archive"),
        (pickle.dumps({"weight": np.zeros(3)}), "a pickle, not of torch.save"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, content, what):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", f"x.pth is {what}")


def test_the_state_of_a_run_is_no_checkpoint(tmp_path, tiny):
    runstate.save({"network": tiny.state_dict()}, tmp_path / "x.state")
    refused(tmp_path / "x.state", "is the state of a run that was not finished; finish that with --resume")


@pytest.mark.filterwarnings("ignore")  # torch's, of TorchScript
def test_archives_that_are_no_checkpoints(tmp_path, tiny):
    torch.jit.save(torch.jit.script(tiny), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "is a TorchScript archive; save its state_dict")
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    refused(tmp_path / "x.npz", "is a zip archive, but not a checkpoint")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_another_protocol_of_pickle(tmp_path, tiny, options):
    torch.save(tiny.state_dict(), tmp_path / "x.pth", pickle_protocol=4, **options)
    refused(tmp_path / "x.pth", "saved with pickle_protocol=4, which is not read")


# safetensors


def safetensors(state, change=lambda header: None, size=0):
    """The bytes of a safetensors file; `change` its header, which is of that size at least."""
    kinds = {dtype: name for name, dtype in checkpoint.SAFETENSORS_TYPES.items()}
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for key, value in state.items():
        parts.append(bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist()))
        stop = at + len(parts[-1])
        header[key] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": [at, stop]}
        at = stop
    change(header)
    text = json.dumps(header).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


TENSORS = {
    "a": torch.randn(2, 3),
    "half": torch.randn(4).half(),
    "brain": torch.randn(2, 1, 2).bfloat16(),
    "double": torch.randn(1).double(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("prefix, size", [("", 0), ("model.", 0x8B1F)])  # a length that gzip files begin with
def test_safetensors(tmp_path, name, prefix, size):
    (tmp_path / name).write_bytes(safetensors(prefixed(TENSORS, prefix), size=size))
    given = read(tmp_path / name)
    assert given.keys() == TENSORS.keys()
    assert all(value.equal(given[key]) and value.dtype == given[key].dtype for key, value in TENSORS.items())


def test_safetensors_as_their_own_package_writes_them(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    given = read(tmp_path / "x.safetensors")
    assert all(value.equal(given[key]) for key, value in TENSORS.items())
    (tmp_path / "y.safetensors").write_bytes(safetensors(TENSORS))
    assert library.load_file(tmp_path / "y.safetensors").keys() == TENSORS.keys()


def test_safetensors_of_a_student(saved, tmp_path):
    state = state_of(saved["student"])
    for key, value in state.items():
        state[key] = value[:0] if value.ndim > 1 else value
    (tmp_path / "x.pth").write_bytes(safetensors(state))
    refused(tmp_path / "x.pth", r"conv1.weight has the shape \(0, 3, 3, 3\)")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(data_offsets=[0, 20]),
        lambda header: header["a"].update(data_offsets=[4, 28]),
        lambda header: header["a"].update(data_offsets=[-24, 0]),
        lambda header: header["a"].update(data_offsets=[24, 0]),
        lambda header: header["a"].update(data_offsets=[False, 24]),
        lambda header: header["a"].update(shape=[3, 3]),
        lambda header: header["a"].update(shape=[-2, -3]),
        lambda header: header["a"].update(shape="23"),
        lambda header: header["a"].update(dtype="F64"),
        lambda header: header["a"].pop("shape"),
        lambda header: header["half"].update(data_offsets=[20, 28]),
        lambda header: header.update(b=header["a"]),
        lambda header: header.pop("flags"),
        lambda header: header.update(empty={"dtype": "F32", "shape": [0, 10**30], "data_offsets": [36, 36]}),
        lambda header: header.update(a=[1]),
    ],
)
def test_damaged_safetensors(tmp_path, change, name):
    (tmp_path / name).write_bytes(safetensors(TENSORS, change))
    refused(tmp_path / name, f"{name} is damaged .cut short..: a safetensors file")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_cut_safetensors(tmp_path, name):
    content = safetensors(TENSORS)
    for part in (content[:-1], content + b"0", content[:60], content[:10], content.replace(b'"half"', b'"a"     ')):
        (tmp_path / name).write_bytes(part)
        refused(tmp_path / name, f"{name} is damaged .cut short..: a safetensors file")
    (tmp_path / "b.safetensors").write_bytes(content[:6])
    refused(tmp_path / "b.safetensors", "is damaged .cut short..: a safetensors file")
    assert any(state is None for state in read_mutants(content, tmp_path / "m.safetensors"))


def test_safetensors_of_a_type_that_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(safetensors(TENSORS, lambda header: header["a"].update(dtype="F4")))
    refused(tmp_path / "x.safetensors", "is a safetensors file with tensors of a type that is not read")


# what a file holds


@pytest.mark.parametrize(
    "make, contents",
    [
        (lambda: build("teacher", 10), ("ResNet-50", 10, "small")),
        (lambda: build("feature_student", 7), ("ResNet-18 with a projector", 7, "small")),
        (lambda: torchvision.models.resnet18(num_classes=5), ("ResNet-18", 5, "standard")),
        (lambda: torchvision.models.resnet34(), ("network of another kind", 1000, "standard")),
        (lambda: torchvision.models.squeezenet1_1(), ("network of another kind", None, None)),
        (lambda: torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 8, 5)}), ("network of another kind", None, None)),
    ],
)
def test_describe(make, contents):
    with torch.device("meta"):
        state = make().state_dict()
    assert checkpoint.describe(state) == contents and checkpoint.stem(state) == contents[2]


# writing


def write(path, content):
    with files.replacing(path) as file:
        file.write(content)


def test_replacing(tmp_path):
    write(tmp_path / "a", b"old")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "a", b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        UserError, match=r"a: No space left on device( \(.* MB are free\))?; what was there is as it was"
    ):
        write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_the_old_file(tmp_path):
    write(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/below: Not a directory; choose another --results_dir"):
        files.ensure_writable(tmp_path / "file" / "below", "--results_dir")


# the teacher's start


@pytest.fixture(scope="module")
def imagenet_state():
    return torchvision.models.resnet50().state_dict()


def is_started(network, state, before):
    now = network.state_dict()
    fresh = [key for key in now if key.startswith(("conv1.", "fc."))]
    return all(now[k].equal(before[k]) for k in fresh) and all(now[k].equal(state[k]) for k in now if k not in fresh)


def copy_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_start_from_a_file(tmp_path, imagenet_state):
    torch.save(imagenet_state, tmp_path / "r50.pth")
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start(network, str(tmp_path / "r50.pth"))
    assert is_started(network, imagenet_state, before)


OWN_ENDS = {
    "conv1.weight": torch.zeros(64, 3, 3, 3),
    "conv1.bias": torch.zeros(64),
    "fc.weight": torch.zeros(7, 2048),
    "fc.bias": torch.full((7,), torch.nan),
}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"net": prefixed({**state, **OWN_ENDS}, "module."), "epoch": 3},
        lambda state: prefixed({key: value for key, value in state.items() if not key.startswith("fc.")}, "backbone."),
        lambda state: {
            **prefixed({key: value for key, value in state.items() if not key.startswith("fc.")}, "module.backbone."),
            "module.projector.0.weight": torch.ones(9, 2048),
            "module.head.mlp.2.weight": torch.ones(9, 9),
        },
    ],
)
def test_start_from_a_file_as_people_have_it(tmp_path, monkeypatch, imagenet_state, change):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(change(imagenet_state), tmp_path / "r50.pth")
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start(network, "~/r50.pth")
    assert is_started(network, imagenet_state, before)


def test_start_from_a_file_of_the_same_stem(saved):
    network = build("student", 7)
    before, state = copy_of(network), state_of(saved["student"])
    checkpoint.start(network, str(saved["student"]), "student")
    for key, value in network.state_dict().items():
        assert value.equal(before[key] if key.startswith("fc.") else state[key]), key


def test_start_from_nothing():
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start(network, "none")
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_start_from_another_network(saved):
    with pytest.raises(UserError, match="holds a ResNet-18, not a ResNet-50"):
        checkpoint.start(build("teacher", 10), str(saved["student"]))


@pytest.fixture(scope="module")
def imagenet_file(imagenet_state):
    buffer = io.BytesIO()
    torch.save(imagenet_state, buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch, imagenet_file):
    """The path of the ImageNet weights in the hub's folder, which is empty, and their bytes."""
    name = f"resnet50-{hashlib.sha256(imagenet_file).hexdigest()[:8]}.pth"
    monkeypatch.setattr(checkpoint, "imagenet_url", lambda arch: f"https://nowhere.invalid/models/{name}")
    return Path(torch.hub.get_dir()) / "checkpoints" / name, imagenet_file


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route"), http.client.IncompleteRead(b"x"), RuntimeError("invalid hash value")]
)
def test_imagenet_weights_that_cannot_be_had(hub, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    path, content = hub
    advice = f"put {path.name} .* into {path.parent}, or give --weights FILE, or --weights none"
    with pytest.raises(UserError, match=advice) as error:
        checkpoint.start(torch.nn.Module(), "imagenet")
    assert "delete" not in str(error.value)
    path.write_bytes(content[:-1000])
    with pytest.raises(UserError, match=rf"{path.name} is damaged: delete it; {advice}"):
        checkpoint.start(torch.nn.Module(), "imagenet")
    assert path.stat().st_size == len(content) - 1000


@pytest.mark.parametrize("there", [False, True])
def test_imagenet_weights_are_downloaded_and_damaged_ones_anew(hub, monkeypatch, imagenet_state, there, capsys):
    path, content = hub
    if there:
        path.parent.mkdir(parents=True)
        path.write_bytes(content[:-1000])
    asked = []

    def download(url, to, hash_prefix, progress):
        assert path.exists() == there  # until what replaces it is whole
        asked.append((url, hash_prefix))
        Path(to).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        network = build("teacher", 10)
        before = copy_of(network)
        checkpoint.start(network, "imagenet")
        assert is_started(network, imagenet_state, before)
    assert asked == [(f"https://nowhere.invalid/models/{path.name}", path.stem[-8:])]
    assert capsys.readouterr().err.count("downloading it anew") == there


def test_the_name_of_the_imagenet_weights():
    with pytest.raises(UserError, match="put resnet50-11ad3fa6.pth"):
        checkpoint.start(torch.nn.Module(), "imagenet")
