"""Data sets, batches, views: from files of the real formats, without a network."""

import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import urllib.error

import numpy as np
import pytest
import torch
from cifar_files import LAYOUTS, write_cifar10, write_cifar100
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as functional_v2

import data
from images import cifar, folders
from util.runtime import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def random_split(n=10, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, size, size, 3), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.arange(n) % 3)


def batches(n=10, batch_size=4, size=8, **options):
    return data.Batches(random_split(n, size), MEAN, STD, batch_size, CPU, **options)


def order(given, epoch=0, start=0):
    return torch.cat([batch.index for batch in given.epoch(epoch, start)]).tolist()


def save_image(path, value=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value % 256, 255 - value)).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes, three images of each for training and one for testing."""
    root = tmp_path / "images"
    for c, label in enumerate(["cat", "dog"]):
        for k in range(3):
            save_image(root / "train" / label / f"{k}.png", 10 * c + k)
        save_image(root / "test" / label / "0.png", 100 + c)
    return root


# digits


def test_digits_are_the_fixed_split(digits):
    assert digits.train.images.shape == (1500, 8, 8, 3) and digits.test.images.shape == (297, 8, 8, 3)
    assert digits.train.images.dtype == torch.uint8 and digits.train.labels.dtype == torch.int64
    assert digits.test.labels.bincount().tolist() == [29, 30, 29, 30, 30, 30, 30, 30, 29, 30]
    assert digits.num_classes == 10 and digits.image_size == 8
    content = b"".join(part.numpy().tobytes() for split in (digits.train, digits.test) for part in split)
    assert hashlib.sha256(content).hexdigest()[:16] == "4b4b50e39b741fc6"


def test_statistics_are_those_of_the_training_pixels(digits):
    pixels = digits.train.images.numpy() / 255
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(digits.std, pixels.std((0, 1, 2)), rtol=1e-9)


# batches


def test_normalise_is_torchvisions():
    images = random_split().images
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = torch.stack([transform(image.numpy()) for image in images])
    given = data.normalise(images, torch.tensor(MEAN), torch.tensor(STD))
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
    assert given.is_contiguous(memory_format=torch.channels_last)


def test_batches_hold_their_images_and_labels():
    split = random_split()
    for batch in batches(shuffle=True).epoch(0):
        expected = data.normalise(split.images[batch.index], torch.tensor(MEAN), torch.tensor(STD))
        assert batch.images.equal(expected) and batch.labels.equal(split.labels[batch.index])


def test_last_short_batch_is_kept():
    given = batches(n=10, batch_size=4)
    assert [len(batch.labels) for batch in given.epoch(0)] == [4, 4, 2] and len(given) == 3 and given.n_images == 10
    assert len(batches(n=8, batch_size=4)) == 2


def test_order_depends_on_seed_and_epoch_alone():
    first = batches(100, shuffle=True, seed=1)
    again = batches(100, shuffle=True, seed=1, batch_size=7)
    assert order(first, 3) == order(again, 3) and sorted(order(first, 3)) == list(range(100))
    orders = {tuple(order(batches(100, shuffle=True, seed=seed), epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert order(batches(100)) == list(range(100))


def test_an_epoch_can_start_anywhere():
    whole = list(batches(shuffle=True, augment=True).epoch(5))
    rest = list(batches(shuffle=True, augment=True).epoch(5, start=1))
    assert len(rest) == 2
    for expected, given in zip(whole[1:], rest, strict=True):
        assert expected.index.equal(given.index) and expected.images.equal(given.images)


# views


def test_crop_and_flip_are_torchvisions():
    split, given = random_split(), batches(augment=True, seed=4)
    views = given.views(2)
    for batch in given.epoch(2):
        for index, image in zip(batch.index, batch.images, strict=True):
            dy, dx, flip = views[index].tolist()
            padded = functional.pad(split.images[index].permute(2, 0, 1), [4, 4, 4, 4])
            seen = functional.crop(padded, dy, dx, 8, 8)
            seen = functional.hflip(seen) if flip else seen
            expected = functional.normalize(seen / 255, MEAN, STD)
            torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)


def test_views_cover_all_offsets_and_both_flips():
    views = batches(3000, augment=True).views(0)
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = views[:, column].bincount()
        assert len(counts) == values and (counts - 3000 / values).abs().max() < 0.25 * 3000 / values


def test_views_do_not_depend_on_the_batches():
    parts = list(batches(augment=True, batch_size=3).epoch(1))
    small = dict(zip(torch.cat([p.index for p in parts]).tolist(), torch.cat([p.images for p in parts]), strict=True))
    large = next(iter(batches(augment=True, batch_size=10).epoch(1)))
    assert all(small[int(index)].equal(image) for index, image in zip(large.index, large.images, strict=True))


# views of large images


def large(n=10, size=72, **options):
    return batches(n, size=size, shuffle=True, augment=True, **options)


def test_large_images_are_cropped_and_resized_as_torchvision_does():
    given = large(seed=4)
    views, originals = given.views(2), given.split.images.permute(0, 3, 1, 2)
    assert given.resizes and not batches(size=64, augment=True).resizes and views.shape == (10, 5)
    for batch in given.epoch(2):
        for index, image in zip(batch.index, batch.images, strict=True):
            *box, flip = views[index].tolist()
            expected = functional_v2.resized_crop(originals[index].float(), *box, [72, 72], antialias=True)
            expected = functional_v2.hflip(expected) if flip else expected
            expected = functional_v2.normalize(expected / 255, MEAN, STD)
            torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)  # a grey level is 1e-2 here
    assert views[:, 4].unique().tolist() == [0, 1]
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_of_the_whole_image_is_the_image():
    images = random_split(2, 72).images
    views = torch.tensor([[0, 0, 72, 72, 0], [0, 0, 72, 72, 1]])
    seen = data.resized_crop(images, views)
    torch.testing.assert_close(seen, torch.stack([images[0], images[1].flip(1)]).float(), rtol=0, atol=0.01)


def test_crops_are_drawn_as_torchvision_draws_them():
    n, size = 4000, 224
    top, left, height, width, flip = large(n, 65).views(0).unbind(1)
    assert (torch.stack([top + height, left + width]) <= 65).all() and (torch.stack([top, left]) >= 0).all()
    assert abs(flip.float().mean() - 0.5) < 0.05
    views = data._resized_crops(n, size, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    image = torch.empty(3, size, size)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, *DEFAULTS) for _ in range(n)])
    for ours, other in ((views, theirs), (views[:, 2] * views[:, 3], theirs[:, 2] * theirs[:, 3])):
        ours, other = (x.double().reshape(n, -1).quantile(QUANTILES, 0) / other.max() for x in (ours, other))
        assert (ours - other).abs().max() < 0.03
    aspects = [(x[:, 3] / x[:, 2]).log() for x in (views, theirs)]
    assert (aspects[0].double().quantile(QUANTILES) - aspects[1].double().quantile(QUANTILES)).abs().max() < 0.03


DEFAULTS = [0.08, 1.0], [3 / 4, 4 / 3]
QUANTILES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)


def test_large_views_depend_on_seed_epoch_and_image_alone():
    whole = list(large(batch_size=3, seed=1).epoch(5))
    for expected, given in zip(whole[2:], large(batch_size=3, seed=1).epoch(5, start=2), strict=True):
        assert expected.index.equal(given.index) and expected.images.equal(given.images)
    at_once = next(iter(large(batch_size=10, seed=1).epoch(5)))
    apart = {int(i): image for batch in whole for i, image in zip(batch.index, batch.images, strict=True)}
    assert all(apart[int(i)].equal(image) for i, image in zip(at_once.index, at_once.images, strict=True))
    views = [large(seed=seed).views(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(view.tolist()) for view in views}) == 4


def test_large_streamed_images_are_seen_as_those_in_memory(tmp_path):
    rng, given = np.random.default_rng(0), []
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            for k in range(3):
                (folder := tmp_path / part / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (90, 80, 3), np.uint8)).save(folder / f"{k}.jpg")
    for stream in (False, True):
        dataset = data.load("folder", tmp_path, 72, stream)
        own = data.Batches(dataset.train, dataset.mean, dataset.std, 4, CPU, shuffle=True, augment=True)
        given.append([batch for epoch in (0, 1) for batch in own.epoch(epoch, epoch)])
    assert all(one.images.equal(other.images) for one, other in zip(*given, strict=True))
    assert [len(run) for run in given] == [3, 3]


@pytest.mark.parametrize("free, fits", [(3839, False), (3840, True), (0, True)])  # 0: not known
def test_images_lie_on_the_device_where_half_of_it_holds_them(free, fits, monkeypatch):
    given = batches(10)
    given.device = torch.device("cuda")
    monkeypatch.setattr(data, "free_memory", lambda device: free)
    assert given._fits() is fits  # 10 images of 8 x 8 x 3 bytes


@pytest.mark.parametrize("augment", [False, True])
def test_images_that_a_device_cannot_hold_are_moved_batch_by_batch(augment, monkeypatch):
    expected = batches(shuffle=True, augment=augment)
    monkeypatch.setattr(data.Batches, "_fits", lambda self: False)
    given = batches(shuffle=True, augment=augment)
    assert given.images is None
    for one, other in zip(expected.epoch(1), given.epoch(1), strict=True):
        assert one.images.equal(other.images) and one.labels.equal(other.labels)


# CIFAR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar100_is_the_same_from_any_copy(layout, tmp_path, monkeypatch, capfd):
    given = []
    for root, kind in ((tmp_path / "a", "folder"), (tmp_path / "b", layout)):
        fits = write_cifar100(root, layout=kind, order=len(given))
        monkeypatch.setitem(cifar.KINDS, "cifar100", fits)
        given.append(data.load("cifar100", root))
    one, other = given
    assert one.train.images.equal(other.train.images) and one.test.labels.equal(other.test.labels)
    assert one.fingerprint == other.fingerprint and one.test_fingerprint == other.test_fingerprint
    assert (other.name, other.classes[:2], other.num_classes) == ("cifar100", ("apple", "aquarium_fish"), 100)
    assert other.train.images.is_contiguous() and other.train.labels.dtype == torch.int64
    assert other.mean == (0.5071, 0.4867, 0.4408) and other.std == (0.2675, 0.2565, 0.2761)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_official_files_order_is_known_where_these_are_read(layout, tmp_path, monkeypatch):
    fits = write_cifar100(tmp_path, layout=layout, order=2)
    monkeypatch.setitem(cifar.KINDS, "cifar100", fits)
    test, order = (loaded := data.load("cifar100", tmp_path)).test, loaded.official_order
    if layout in ("png", "png_below", "parquet"):
        assert order is None
        return
    assert test.labels[order].tolist() == np.random.default_rng(2).permutation(100).tolist()  # an image of each class


def test_cifar100s_images_are_planes_of_red_green_and_blue(tmp_path, monkeypatch):
    monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(tmp_path, 100, 100))
    loaded = data.load("cifar100", tmp_path)
    raw = pickle.loads((tmp_path / "cifar-100-python" / "test").read_bytes())
    image, label = raw[b"data"][3].reshape(3, 32, 32).transpose(1, 2, 0), raw[b"fine_labels"][3]
    (at,) = (loaded.test.labels == label).nonzero().flatten().tolist()
    assert np.array_equal(loaded.test.images[at].numpy(), image)


@pytest.mark.parametrize("layout", ["folder", "bare", "archive", "png"])
def test_cifar10_is_the_same_from_any_copy(layout, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(cifar.KINDS, "cifar10", write_cifar10(tmp_path / "a"))
    expected = data.load("cifar10", tmp_path / "a")
    assert expected.num_classes == 10 and len(expected.train.labels) == 50
    assert expected.mean != (0.5071, 0.4867, 0.4408)
    assert capfd.readouterr().err == ""
    write_cifar10(tmp_path / "b", layout=layout, order=1)  # other files than those whose md5 is known
    given = data.load("cifar10", tmp_path / "b")
    assert given.fingerprint == expected.fingerprint
    assert "is taken for CIFAR-10 by counts and classes" in capfd.readouterr().err


def test_the_real_sets_are_known_by_what_they_are():
    for kind, official in ((cifar.KINDS["cifar100"], datasets.CIFAR100), (cifar.KINDS["cifar10"], datasets.CIFAR10)):
        lists = [*official.train_list, *official.test_list]
        assert [name for part in kind.files.values() for name in part] == [name for name, _ in lists]
        assert kind.md5s in (None, dict(lists))
        assert (kind.folder, kind.archive, kind.url) == (official.base_folder, official.filename, official.url)
        assert kind.names == (official.meta["filename"], official.meta["key"])
        assert kind.counts == {"train": 50_000, "test": 10_000} and len(set(kind.classes)) in (10, 100)


@pytest.mark.parametrize("layout", ["folder", "png"])
def test_a_copy_that_is_not_whole_says_what_is_missing(layout, tmp_path, monkeypatch):
    fits = write_cifar100(tmp_path, 199, 98, layout)
    monkeypatch.setitem(cifar.KINDS, "cifar100", dataclasses.replace(fits, counts={"train": 200, "test": 100}))
    missing = r"not whole: train has 199 of 200 images \(worm 1 of 2\); test has 98 of 100 images \(woman 0 of 1, worm"
    with pytest.raises(UserError, match=f"{tmp_path}.*: CIFAR-100, but {missing}.*put cifar-100-python.tar.gz"):
        data.load("cifar100", tmp_path)
    assert not (tmp_path / ".decoded_32.npz").exists()  # nothing was decoded for it


def test_a_copy_with_other_pixels_is_refused(tmp_path, monkeypatch):
    fits = write_cifar100(tmp_path, 100, 100)
    digests = {**fits.digests, "test": "0" * 64}
    monkeypatch.setitem(cifar.KINDS, "cifar100", dataclasses.replace(fits, digests=digests))
    with pytest.raises(UserError, match="as many images as CIFAR-100, but in test pixels or labels differ"):
        data.load("cifar100", tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"x", "train is no pickle of arrays"),
        (pickle.dumps(Evil()), "train: it wants to call builtins.print"),
        (pickle.dumps([1]), "train holds no dictionary"),
        (pickle.dumps({b"data": np.zeros((1, 12), np.uint8)}), "train holds no images"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}), "train holds no fine_labels"),
        (None, "there is no train"),
    ],
)
def test_a_damaged_cifar_file_is_named(content, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(tmp_path, 100, 100, "bare"))
    (tmp_path / "train").unlink() if content is None else (tmp_path / "train").write_bytes(content)
    with pytest.raises(UserError, match=f"is incomplete or damaged: {message}.*own train, test and meta"):
        data.load("cifar100", tmp_path)
    assert "code was run" not in capfd.readouterr().out


def test_other_names_of_cifar10s_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(cifar.KINDS, "cifar10", write_cifar10(tmp_path))
    names = [*reversed(cifar.KINDS["cifar10"].classes)]
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    with pytest.raises(UserError, match="batches.meta names other classes, or in another order"):
        data.load("cifar10", tmp_path)


def test_a_whole_copy_is_found_beside_a_damaged_one_and_other_data(tree, monkeypatch):
    monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(tree.parent, 100, 100, "below"))
    (tree.parent / "cifar-100-python").mkdir()
    (tree.parent / "cifar-100-python" / "train").write_bytes(b"x")
    assert len(data.load("cifar100", tree.parent).train.labels) == 100


@pytest.fixture
def no_download(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


@pytest.mark.parametrize("name, file", [("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz")])
def test_no_network_says_where_to_put_the_file(name, file, tmp_path, no_download):
    with pytest.raises(UserError, match=f"put {file} .* into {tmp_path}.*--dataset digits"):
        data.load(name, tmp_path)


def test_what_was_downloaded_is_read(tmp_path, monkeypatch):
    def download(root, download):
        print("Extracting")
        monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(root, 100, 100))

    download.filename, download.url = "cifar-100-python.tar.gz", "https://..."
    monkeypatch.setattr(datasets, "CIFAR100", download)
    monkeypatch.setitem(cifar.KINDS, "cifar100", write_cifar100(tmp_path / "as it will be", 100, 100))
    assert len(data.load("cifar100", tmp_path / "data").train.labels) == 100


def test_a_cut_archive_is_fetched_anew(tmp_path, no_download):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="cifar-100-python.tar.gz is incomplete or damaged, and cifar100 can't"):
        data.load("cifar100", tmp_path)


def test_other_data_sets_are_not_taken_for_cifar(tree, no_download):
    with pytest.raises(UserError, match="cifar10 can't be downloaded"):
        data.load("cifar10", tree)  # of a cat and a dog


# to test a network on


TRAINED = {"mean": MEAN, "std": STD}


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_without_train_can_be_tested_on(tree, stream):
    whole = data.load("folder", tree)
    (tree / "train").rename(tree.parent / "elsewhere")
    loaded = data.load("folder", tree, 32, stream, classes=("cat", "dog"), **TRAINED)
    assert loaded.train is None and (loaded.mean, loaded.std) == (MEAN, STD)
    assert loaded.test_fingerprint == whole.test_fingerprint == loaded.fingerprint and loaded.image_size == 32
    assert data.load("folder", tree.parent / "images", classes=("dog", "cat"), **TRAINED).test.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="train is not there"):
        data.load("folder", tree)


@pytest.mark.parametrize("train", [True, False])
def test_labels_are_numbered_by_the_networks_classes(tree, train):
    if not train:
        (tree / "train").rename(tree.parent / "elsewhere")
    loaded = data.load("folder", tree, classes=("eel", "dog", "cat"), **TRAINED)
    assert loaded.test.labels.tolist() == [2, 1] and loaded.num_classes == 3 and loaded.mean == MEAN
    assert not train or loaded.train.labels.tolist() == [2, 2, 2, 1, 1, 1]
    with pytest.raises(UserError, match="classes in test/ that the network does not know: dog"):
        data.load("folder", tree, classes=("cat", "eel"), **TRAINED)


def test_digits_are_numbered_by_the_networks_classes(digits):
    loaded = data.load("digits", classes=tuple("9876543210"), **TRAINED)
    assert loaded.test.labels.equal(9 - digits.test.labels) and loaded.train.labels.equal(9 - digits.train.labels)
    assert loaded.test_fingerprint != digits.test_fingerprint
    with pytest.raises(UserError, match="digits: the network was trained on other classes; it does not know 9"):
        data.load("digits", classes=tuple("012345678"), **TRAINED)


# held out


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_held_out_images_are_a_part_of_each_class(digits, fraction):
    train, val = data.held_out(digits.train, fraction, 10)
    whole, held = digits.train.labels.bincount(), val.labels.bincount()
    assert held.equal((whole * fraction + 0.5).long().clamp(min=1)) and (train.labels.bincount() + held).equal(whole)
    rows = [{image.numpy().tobytes() for image in part.images} for part in (digits.train, train, val)]
    assert rows[0] == rows[1] | rows[2] and train.images.is_contiguous()
    again = data.held_out(digits.train, fraction, 10)
    assert again[1].images.equal(val.images) and again[0].labels.equal(train.labels)


def test_held_out_leaves_each_class_an_image():
    split = data.Split(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 0, 1, 2]))
    train, val = data.held_out(split, 0.1, 4)
    assert val.labels.tolist() == [0] and sorted(train.labels.tolist()) == [0, 1, 2]
    with pytest.raises(UserError, match="--val_fraction 0.9 leaves 1 of 4 classes without a training image"):
        data.held_out(split, 0.9, 4)


def test_a_data_set_with_images_held_out_is_the_same_one(digits):
    divided = digits.holding_out(0.2)
    assert len(divided.val.labels) + len(divided.train.labels) == 1500
    assert (divided.fingerprint, divided.test_fingerprint) == (digits.fingerprint, digits.test_fingerprint)
    splits = (digits.train, divided.train, divided.val)
    prints = {data.Batches(split, MEAN, STD, 10, CPU).fingerprint() for split in splits}
    assert len(prints) == 3


# folders


def test_folder(tree):
    loaded = data.load("folder", tree)
    assert loaded.classes == ("cat", "dog") and loaded.image_size == 32
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and loaded.test.labels.tolist() == [0, 1]
    assert loaded.train.images[4, 5, 6].tolist() == [11, 22, 244]


def test_folder_resizes_and_cuts_the_middle(tree):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tree / "train" / "cat" / "0.png")
    loaded = data.load("folder", tree, 16)
    assert loaded.train.images.shape == (6, 16, 16, 3)
    assert (loaded.train.images[0, :, 2:14] > 190).all()


def test_folder_reads_all_kinds_of_images(tree):
    gray = Image.fromarray(np.full((32, 32), 90, np.uint8))
    gray.save(tree / "train" / "cat" / "0.png")
    gray.convert("P").save(tree / "train" / "cat" / "1.gif")
    Image.new("RGBA", (32, 32), (1, 2, 3, 128)).save(tree / "train" / "cat" / "2.PNG")
    (tree / "train" / "cat" / ".DS_Store").write_text("x")
    loaded = data.load("folder", tree)
    assert loaded.train.images[0, 0, 0].tolist() == [90, 90, 90]
    assert (loaded.train.labels == 0).sum() == 5


def test_class_folders_may_be_links(tree, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "linked" / part).mkdir(parents=True)
        for label in ("cat", "dog"):
            (tmp_path / "linked" / part / label).symlink_to(tree / part / label)
    assert data.load("folder", tmp_path / "linked").fingerprint == data.load("folder", tree).fingerprint


@pytest.fixture
def decodes(monkeypatch):
    """How many images were decoded."""
    counted, read = [], folders.read_image

    def count(path, size):
        counted.append(path)
        return read(path, size)

    monkeypatch.setattr(folders, "read_image", count)
    return counted


def test_decoded_images_are_kept(tree, decodes):
    first = data.load("folder", tree)
    assert len(decodes) == 8
    again = data.load("folder", tree)
    assert len(decodes) == 8
    assert first.train.images.equal(again.train.images) and first.test.labels.equal(again.test.labels)
    data.load("folder", tree, 16)
    assert len(decodes) == 16
    assert not list(tree.glob("*.tmp"))


@pytest.mark.parametrize("change", ["content", "replaced", "rewritten", "added", "removed", "renamed", "moved"])
def test_a_changed_folder_is_noticed(tree, decodes, change):
    image = tree / "train" / "dog" / "2.png"
    image.write_bytes(image.read_bytes().ljust(2000, b"\0"))
    first = data.load("folder", tree)
    if change in ("replaced", "rewritten"):  # as by rsync -t, by cp -p: of the same size and time
        other = tree.parent / "new.png"
        save_image(other, 77)
        other.write_bytes(other.read_bytes().ljust(2000, b"\0"))
        shutil.copystat(image, other)
        other.replace(image) if change == "replaced" else shutil.copy2(other, image)
    elif change == "content":
        status = image.stat()
        save_image(image, 77)
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "added":
        save_image(tree / "train" / "dog" / "3.png", 77)
    elif change == "removed":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("9.png"))
    else:
        image.rename(tree / "train" / "cat" / "9.png")
    before = len(decodes)
    loaded = data.load("folder", tree)
    assert len(decodes) > before
    assert len(loaded.train.labels) == {"added": 7, "removed": 5}.get(change, 6)
    assert not loaded.train.images.equal(first.train.images) or change in ("renamed", "moved")
    if change == "moved":
        assert loaded.train.labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "damage",
    ["empty", "garbage", "cut short", "a bit", "compressed", "encrypted", "no test", "flat", "floats", "array"],
)
def test_a_damaged_cache_is_made_anew(tree, decodes, capfd, damage):
    expected = data.load("folder", tree)
    cache = tree / ".decoded_32.npz"
    content, arrays = bytearray(cache.read_bytes()), dict(np.load(cache))
    member = content.rindex(b"PK\x01\x02")  # of the directory of members
    if damage in ("a bit", "compressed", "encrypted"):
        content[{"a bit": len(content) // 2, "compressed": member + 10, "encrypted": member + 8}[damage]] ^= 1
    elif damage in ("no test", "flat", "floats"):
        test = arrays.pop("test")
        arrays |= {"no test": {}, "flat": {"test": test.reshape(-1)}, "floats": {"test": test.astype(float)}}[damage]
        np.savez(file := io.BytesIO(), **arrays)
        content = file.getvalue()
    elif damage == "array":
        np.save(file := io.BytesIO(), arrays["test"])
        content = file.getvalue()
    else:
        content = {"empty": b"", "garbage": b"garbage", "cut short": content[:-500]}[damage]
    cache.write_bytes(content)
    for decoded in (16, 16):
        loaded = data.load("folder", tree)
        assert len(decodes) == decoded and loaded.train.images.equal(expected.train.images)
    assert capfd.readouterr().err == f"{cache} is damaged: the images are decoded anew\n"


def test_a_cache_that_cannot_be_written_is_no_failure(tree, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(data.load("folder", tree).train.labels) == 6
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for c, label in enumerate(["n01", "n02"]):
        for k in range(2):
            save_image(root / "train" / label / "images" / f"{label}_{k}.JPEG", 10 * c + k, (64, 64))
        save_image(root / "val" / "images" / f"val_{c}.JPEG", 50, (64, 64))
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\nval_1.JPEG\tn01\t0\t0\t62\t62\n")
    for folder in (tmp_path, root):
        loaded = data.load("tiny_imagenet", folder)
        assert loaded.classes == ("n01", "n02") and loaded.image_size == 64
        assert loaded.train.labels.tolist() == [0, 0, 1, 1] and loaded.test.labels.tolist() == [1, 0]
    assert data.load("tiny_imagenet", tmp_path, 32).image_size == 32


# mistakes


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("mnist", None, "unknown data set mnist; there are cifar100, cifar10"),
        ("digits", 16, "--image_size: the images of digits have a fixed size"),
        ("folder", 4, "--image_size 4 is too small"),
        ("folder", None, "train is not there; .* must hold train/<class>"),
        ("tiny_imagenet", None, "no tiny-imagenet-200 folder"),
    ],
)
def test_mistakes(name, size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        data.load(name, tmp_path, size)


def test_an_empty_split_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train holds no images"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tree, content):
    image = tree / "train" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=f"cannot read the image {image}"):
        data.load("folder", tree)
    assert not (tree / ".decoded_32.npz").exists()


def test_a_change_of_one_pixel_or_label_is_another_data_set(digits):
    images, labels = digits.test.images.clone(), digits.test.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] ^= 1
    others = [data.Split(images, digits.test.labels), data.Split(digits.test.images, labels)]
    prints = {dataclasses.replace(digits, test=test).fingerprint for test in [digits.test, *others]}
    assert len(prints) == 3
