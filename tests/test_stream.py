"""Images streamed from the disk are those of memory: same order, same pixels, same losses."""

import dataclasses
import re
import shutil
import threading
import time

import pytest
import torch
from PIL import Image
from test_scripts import refused

import data
from data import Batches
from images import folders
from util.runtime import UserError

CPU = torch.device("cpu")


@pytest.fixture
def root(small, tmp_path):
    """A copy of the small folder, to be changed."""
    return shutil.copytree(small[3], tmp_path / "images")


def both(root):
    return data.load("folder", root, 8), data.load("folder", root, 8, stream=True)


def test_the_data_set_is_the_same(root):
    decoded, streamed = both(root)
    assert isinstance(streamed.train.images, data.ImageFiles)
    assert (streamed.mean, streamed.std) == (decoded.mean, decoded.std)
    assert streamed.train.labels.equal(decoded.train.labels) and streamed.classes == decoded.classes
    assert streamed.image_size == 8
    assert (streamed.fingerprint, streamed.test_fingerprint) == (decoded.fingerprint, decoded.test_fingerprint)
    again = data.load("folder", root, 8, stream=True)  # as kept beside the images
    for dataset in (streamed, again, dataclasses.replace(streamed, measured=None)):
        assert (dataset.fingerprint, dataset.mean) == (decoded.fingerprint, decoded.mean)
        assert prints(dataset.holding_out(0.3)) == prints(decoded.holding_out(0.3))


def prints(dataset):
    """What the teacher's cache and a resumed run know each split by."""
    return [Batches(split, dataset.mean, dataset.std, 12, CPU).fingerprint() for split in (dataset.train, dataset.val)]


@pytest.mark.parametrize("augment", [False, True])
def test_the_batches_are_the_same(root, augment):
    given, random = [], torch.get_rng_state()
    for dataset in both(root):
        batches = Batches(dataset.train, dataset.mean, dataset.std, 12, CPU, shuffle=True, seed=4, augment=augment)
        given.append([batch for epoch in (0, 1) for batch in batches.epoch(epoch, epoch)])
    for one, other in zip(*given, strict=True):
        assert one.images.equal(other.images) and one.labels.equal(other.labels) and one.index.equal(other.index)
    assert torch.get_rng_state().equal(random)  # to read images is not to draw from the run's own numbers


def test_a_script_trains_to_the_same_losses(script, small, small_teacher):
    out = []
    for flags in ([], ["--stream"]):
        ran = script("train_distillation.py", "--model_job", "distillation_LDH5", *small, "--teacher", small_teacher,
                     "--epochs", 1, "--batch_size", 16, "--checkpoint_dir", f"c{len(out)}", *flags)  # fmt: skip
        assert ran.code == 0, ran.err
        out.append(ran.out)
    assert out[0] == out[1] and out[0].count("Epoch") == 1


def test_streaming_is_chosen_where_memory_is_short_and_said(root, monkeypatch, capfd):
    needed = (40 + 12) * 8 * 8 * 3
    monkeypatch.setattr(data, "free_memory", lambda device: 2 * needed)
    assert isinstance(data.load("folder", root, 8).train.images, torch.Tensor)
    monkeypatch.setattr(data, "free_memory", lambda device: 2 * needed - 1)
    assert isinstance(data.load("folder", root, 8).train.images, data.ImageFiles)
    assert re.match(r"streaming: .*of memory .* are free\n$", capfd.readouterr().err)


def test_the_mean_is_kept_and_measured_anew_when_an_image_changes(root, monkeypatch):
    first = data.load("folder", root, 8, stream=True)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_measure", lambda splits: pytest.fail("measured again"))
        assert data.load("folder", root, 8, stream=True).mean == first.mean
    Image.new("RGB", (8, 8), "white").save(root / "train" / "class0" / "0.png")
    second = data.load("folder", root, 8, stream=True)
    assert second.mean > first.mean and second.mean == data.load("folder", root, 8).mean
    assert second.fingerprint != first.fingerprint and second.test_fingerprint == first.test_fingerprint


def test_a_mean_that_was_changed_is_measured_anew(root):
    first, kept = data.load("folder", root, 8, stream=True), root / ".statistics_8.json"
    kept.write_text(kept.read_text().replace("0.", "0.1", 1))
    assert data.load("folder", root, 8, stream=True).mean == first.mean


def test_an_unreadable_image_is_named(script, small, root):
    (root / "train" / "class2" / "5.png").write_bytes(b"no image")
    args = ["--model_job", "student", *small, "--data_dir", root, "--stream", "--epochs", 1]
    refused(script("train.py", *args), "class2/5.png", "mend or remove it")


def test_all_unreadable_images_are_named_at_once(root):
    for k in range(3):
        (root / "train" / f"class{k}" / "5.png").write_bytes(b"no image")
    (root / "test" / "class0" / "0.png").write_bytes(b"")
    for _ in range(2):  # nothing is kept of a folder that can't be read
        with pytest.raises(UserError, match="^4 images can't be read: .*class0/5.png, .*class2/5.png, .*; mend"):
            data.load("folder", root, 8, stream=True)


def test_who_stops_reading_leaves_no_thread_at_work(root, monkeypatch):
    streamed, decoded, read = data.load("folder", root, 8, stream=True), [], folders.read_image

    def count(path, size):
        decoded.append(path)
        time.sleep(0.01)
        return read(path, size)

    monkeypatch.setattr(folders, "_threads", lambda: 2)
    monkeypatch.setattr(folders, "read_image", count)
    before = set(threading.enumerate())  # an earlier test's threads may idle
    reading = streamed.train.images.read([torch.arange(40)] * 100)
    next(reading)
    reading.close()
    deadline = time.time() + 10
    while set(threading.enumerate()) - before and time.time() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before and len(decoded) < 80  # what was to be read ahead is not


def test_data_in_one_piece_is_not_streamed(script):
    refused(script("train.py", "--model_job", "student", "--dataset", "digits", "--stream"), "--stream")
