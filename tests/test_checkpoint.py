"""Checkpoints: both layouts, and a clear refusal for everything else."""

import errno
import os
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

import checkpoint
import files
from models import build
from runtime import UserError

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


@pytest.mark.parametrize("length", [0, 1, 100, 10_000, 1_000_000, -1, -100, -20_000])
def test_truncated(saved, tmp_path, length):
    (tmp_path / "cut.pth").write_bytes(saved["student"].read_bytes()[:length])
    refused(tmp_path / "cut.pth", "cut.pth is damaged")


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


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, {}, torch.zeros(3), {"model": {"a": torch.zeros(1)}}, {1: 2}])
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
