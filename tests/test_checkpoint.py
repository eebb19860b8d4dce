"""Checkpoints: both layouts, and a clear refusal for everything else."""

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
    given = checkpoint.read(saved["student"], HINT)
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


@pytest.mark.parametrize("length", [0, 1, 100, 10_000, 1_000_000, -1, -71, -100, -20_000])
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
            state = checkpoint.read(path, HINT)
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
    read = checkpoint.read(tmp_path / "x.pth", HINT)
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
    assert checkpoint.read(tmp_path / "x.pth", HINT).keys() == {"weight", "bias"}
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
        {"model": {"a": torch.zeros(1)}},
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


def test_weights_may_be_nan_parameters_or_of_another_precision(saved, tmp_path):
    state = state_of(saved["student"])
    bias = torch.nn.Parameter(torch.full((10,), torch.nan, dtype=torch.float16))
    torch.save({**state, "fc.bias": bias}, tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth").state_dict()
    assert loaded["fc.bias"].isnan().all() and loaded["fc.weight"].equal(state["fc.weight"])


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


def test_imagenet_weights_that_are_there(imagenet_state):
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(imagenet_state, folder / "resnet50-11ad3fa6.pth")
    network = build("teacher", 10)
    before = copy_of(network)
    checkpoint.start_teacher(network, "imagenet")
    assert is_started(network, imagenet_state, before)
