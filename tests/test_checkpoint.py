"""Checkpoints: both layouts, and a clear refusal for everything else."""

import argparse
import errno
import hashlib
import io
import os
import pickle
import re
import urllib.error
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_runstate import mutations

import checkpoint
from models import build
from util import files
from util.runtime import UserError

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
    given, _ = checkpoint.read(saved["student"], HINT)
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


def test_missing(tmp_path):
    refused(tmp_path / "no.pth", "no.pth does not exist; make it with: python train.py")


def test_a_folder(tmp_path):
    refused(tmp_path, "cannot read .*directory")


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
    """What each mutant of the file reads as, None for a refusal; nothing else may come of it."""
    for mutant in mutations(content, 3000):
        path.write_bytes(mutant)
        try:
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
    checkpoint.save(tiny, tmp_path / "a.pth")
    assert not any(read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth"))


def test_damage_to_a_file_from_elsewhere_is_refused_or_harmless(tmp_path, tiny):
    state = tiny.state_dict()
    torch.save(state, tmp_path / "a.pth")
    read = [given for given in read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth") if given]
    assert 0 < len(read) < 600  # there is padding
    assert all(given.keys() == state.keys() for given in read)
    assert all(value.equal(state[key]) for given in read for key, value in given.items())


@pytest.mark.filterwarnings("ignore")  # torch's, of pickles of other protocols
def test_damage_to_a_file_in_the_older_format_never_crashes(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    read = list(read_mutants((tmp_path / "a.pth").read_bytes(), tmp_path / "m.pth"))
    assert any(state is None for state in read) and any(read)


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
    read, _ = checkpoint.read(tmp_path / "x.pth", HINT)
    assert all(value.equal(read[key]) for key, value in tiny.state_dict().items())


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
    assert checkpoint.read(tmp_path / "x.pth", HINT)[0].keys() == {"weight", "bias"}
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
        {"model": {"a": torch.zeros(())}},
        {"model": {"module": {"a": {"too deep": torch.zeros(1)}}}},
        {1: 2},
        {1: torch.zeros(1)},
        {"two\nlines": torch.zeros(1)},
        {"\udc80": torch.zeros(1)},
    ],
)
def test_not_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "is not a state_dict")


@pytest.mark.parametrize(
    "holds, needed, message",
    [
        ("teacher", "student", "holds a ResNet-50, not the ResNet-18 needed"),
        ("student", "teacher", "holds a ResNet-18, not the ResNet-50"),
        ("student", "feature_student", "holds a ResNet-18, not the ResNet-18 with a projector"),
        ("feature_student", "student", "holds a ResNet-18 with a projector, not the ResNet-18 needed"),
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
        (lambda: torch.zeros(10).to_sparse(), "is not a state_dict"),
        (lambda: torch.zeros(10, device="meta"), "is not a state_dict"),
        (lambda: torch.nested.nested_tensor([torch.zeros(4), torch.zeros(6)]), "is not a state_dict"),
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
    read = torch.load(tmp_path / "x.pth", weights_only=True)
    assert read.items == 1 and read["fc.bias"].copy_ == 1
    assert all(value.equal(state[key]) for key, value in load(tmp_path / "x.pth").state_dict().items())


def test_weights_may_be_parameters_or_of_another_precision(saved, tmp_path):
    state = state_of(saved["student"])
    bias = torch.nn.Parameter(torch.full((10,), 0.5, dtype=torch.float16))
    torch.save({**state, "fc.bias": bias}, tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth").state_dict()
    assert (loaded["fc.bias"] == 0.5).all() and loaded["fc.weight"].equal(state["fc.weight"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(saved, tmp_path, value):
    state = state_of(saved["student"])
    state["layer2.0.bn1.running_var"][3] = value
    torch.save(state, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds NaN or infinity in layer2.0.bn1.running_var: its training diverged")


# as people have them


def as_safetensors(state):
    from safetensors.torch import save

    return save(state, metadata={"format": "pt"})


def renamed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def beside(state, **others):
    return {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, **others, **state}


LAYERED = {"base.0.": "conv1.", "base.1.": "bn1.", **{f"base.{3 + i}.": f"layer{i}." for i in range(1, 5)}}
FORMS = {
    **{f"under {name}": lambda state, name=name: beside({name: state}) for name in ("state_dict", "model", "net")},
    "two levels": lambda state: {"checkpoint": {"model_state_dict": state}},
    **{f"prefix {prefix}": lambda state, prefix=prefix: renamed(state, prefix) for prefix in ("module.", "_orig_mod.")},
    "prefixes": lambda state: beside({"model": renamed(state, "module.model.")}),
    "lightning": lambda state: {
        "pytorch-lightning_version": "2.4",
        "state_dict": {**renamed(state, "model."), "criterion.weight": torch.ones(10), "train_acc.tp": torch.ones(10)},
    },
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **renamed(state, "module.")},
    "thop": lambda state: {**state, "total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "an epoch among the weights": lambda state: {**state, "epoch": 7, "best_acc": torch.tensor(71.2)},
    "namespace": lambda state: beside({"model": state}, args=argparse.Namespace(lr=0.1, model="resnet18")),
    "numpy": lambda state: beside({"model": state}, best=np.float64(71.2), top5=np.float32(91)),
    "no counters": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    "the teacher's beside the student's": lambda state: {
        "teacher": {"conv1.weight": torch.zeros(2, 3, 3, 3)}, "student": state,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_as_people_have_it(saved, tmp_path, form, capfd):
    state = state_of(saved["student"])
    torch.save(FORMS[form](state), tmp_path / "x.pth.tar")
    loaded = load(tmp_path / "x.pth.tar").state_dict()
    assert all(value.equal(state[key]) for key, value in loaded.items() if "num_batches" not in key)
    told = capfd.readouterr().err
    assert ("those of student are taken" in told) if "beside" in form else told == ""


@pytest.mark.parametrize("form", ["prefixes", "namespace", "no counters"])
def test_the_older_layout_as_people_have_it(saved, tmp_path, form):
    state = state_of(saved["feature_student"])
    older = {}
    for key, value in state.items():
        new, old = next(((new, old) for old, new in LAYERED.items() if key.startswith(new)), ("", ""))
        older[old + key[len(new) :]] = value
    torch.save(FORMS[form](older), tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth", "feature_student").state_dict()
    assert all(value.equal(state[key]) for key, value in loaded.items() if "num_batches" not in key)


def test_real_weights_beside_the_networks_own_are_still_refused(saved, tmp_path):
    state = state_of(saved["student"])
    torch.save({**renamed(state, "module."), "other.weight": torch.zeros(3)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "holds a network of another kind")


class Stateful(argparse.Namespace):
    pass


def test_a_namespace_runs_nothing(saved, tmp_path):
    """Only argparse's own; and what it holds is looked at like all else."""
    evil = argparse.Namespace(run=Touch(tmp_path / "ran"))
    for args in (Stateful(lr=1), evil):
        torch.save({"model": state_of(saved["student"]), "args": args}, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", "could run code: refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors(saved, tmp_path, kind):
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in state_of(saved["student"]).items()}
    for name, content in (("x.safetensors", state), ("x.pth", renamed(state, "module."))):
        (tmp_path / name).write_bytes(as_safetensors(content))
        loaded = load(tmp_path / name).state_dict()
        assert all(value.equal(state[key].to(value.dtype)) for key, value in loaded.items())


def test_damaged_safetensors(tmp_path):
    whole = as_safetensors({"a": torch.arange(6.0), "b": torch.zeros(2, 2)})
    (tmp_path / "x.safetensors").write_bytes(whole)
    assert checkpoint.read(tmp_path / "x.safetensors", HINT)[0]["a"].tolist() == [0, 1, 2, 3, 4, 5]
    size = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + size], whole[8 + size :]
    damages = [whole[:-1], whole + b"0", whole[: 8 + size // 2]]
    for old, new in ((b"[0,24]", b"[0,20]"), (b"[24,40]", b"[20,36]"), (b'"F32"', b'"F99"'), (b"[6]", b"[-6]")):
        assert old in header
        changed = header.replace(old, new)
        damages.append(len(changed).to_bytes(8, "little") + changed + data)
    for damaged in damages:
        (tmp_path / "x.safetensors").write_bytes(damaged)
        refused(tmp_path / "x.safetensors", "x.safetensors is damaged")


OTHERS = {
    "is empty": b"",
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "is a page of HTML": b"\n<!DOCTYPE html><html>",
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "is compressed by gzip": b"\x1f\x8b\x08" + bytes(99),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_it_is_not_is_said(tmp_path, message):
    (tmp_path / "x.pth").write_bytes(OTHERS[message])
    refused(tmp_path / "x.pth", f"x.pth {message}")


@pytest.mark.filterwarnings("ignore")  # it is deprecated
def test_torchscript_is_named(tmp_path, tiny):
    torch.jit.script(tiny).save(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "is a TorchScript archive")


def test_a_whole_model_is_named(tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=10), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"holds a whole model \(torchvision.models.resnet.ResNet\).*Save model.state_dict\(\)")


# what it says of itself

ABOUT = {
    "network": "student",
    "stem": "small",
    "classes": ["a", "\udc80"],
    "image_size": 8,
    "mean": [0.5],
    "std": [1.0],
}


def test_what_a_file_says_of_its_weights(tmp_path, tiny):
    checkpoint.save(tiny, tmp_path / "x.pth", ABOUT)
    state, about = checkpoint.read(tmp_path / "x.pth", HINT)
    assert about == ABOUT and state.keys() == {"weight", "bias"}
    for source in (tmp_path / "x.pth", io.BytesIO((tmp_path / "x.pth").read_bytes())):
        assert torch.load(source, weights_only=True).keys() == state.keys()
    assert torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)["bias"].equal(tiny.bias)
    before = (tmp_path / "x.pth").read_bytes()
    checkpoint.save(tiny, tmp_path / "x.pth", ABOUT)
    assert (tmp_path / "x.pth").read_bytes() == before  # nothing of the hour is in it


@pytest.mark.parametrize("flaw", [{"classes": "abc"}, {"image_size": "8"}, {"mean": None}])
def test_what_a_file_says_is_checked(tmp_path, tiny, flaw):
    checkpoint.save(tiny, tmp_path / "x.pth", {**ABOUT, **flaw})
    refused(tmp_path / "x.pth", "x.pth is damaged")


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
    with pytest.raises(UserError, match="a: No space left on device; what was there is as it was"):
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
    checkpoint.start_teacher(network, str(tmp_path / "r50.pth"))
    assert is_started(network, imagenet_state, before)


def test_start_from_nothing():
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start_teacher(network, "none")
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_start_from_another_network(saved):
    with pytest.raises(UserError, match="holds a ResNet-18, not a ResNet-50"):
        checkpoint.start_teacher(build("teacher", 10), str(saved["student"]))


def test_imagenet_weights_without_a_network(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    with pytest.raises(UserError, match=f"put resnet50-11ad3fa6.pth .* into {folder}, or give --weights FILE"):
        checkpoint.start_teacher(build("teacher", 10), "imagenet")


def test_imagenet_weights_that_are_there(imagenet_state, monkeypatch):
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(imagenet_state, folder / "resnet50-11ad3fa6.pth")
    monkeypatch.setattr(checkpoint, "sha256", lambda path: "11ad3fa6" + "0" * 56)
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start_teacher(network, "imagenet")
    assert is_started(network, imagenet_state, before)


def test_a_cut_imagenet_file_is_fetched_anew(imagenet_state, monkeypatch, capfd):
    path = Path(torch.hub.get_dir()) / "checkpoints" / "resnet50-11ad3fa6.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut")
    with pytest.raises(UserError, match=f"delete {path}, which is damaged"):  # no network
        checkpoint.start_teacher(build("teacher", 10), "imagenet")
    assert path.read_bytes() == b"cut"

    def fetch(url, target, hash_prefix, progress):
        assert hash_prefix == "11ad3fa6"
        torch.save(imagenet_state, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    network = build("teacher", 10)
    checkpoint.start_teacher(network, "imagenet")
    assert network.layer1[0].conv1.weight.equal(imagenet_state["layer1.0.conv1.weight"])
    assert "it is downloaded anew" in capfd.readouterr().err
