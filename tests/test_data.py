"""Data sets, batches, views: from files of the real formats, without a network."""

import dataclasses
import hashlib
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional

import data
from util import images
from util.runtime import UserError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def random_split(n=10, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, size, size, 3), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.arange(n) % 3)


def batches(n=10, batch_size=4, **options):
    return data.Batches(random_split(n), MEAN, STD, batch_size, CPU, **options)


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


# CIFAR


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A tiny CIFAR-100 in the format of the real one, its checksums made to fit."""
    return make_cifar(tmp_path, monkeypatch, datasets.CIFAR100, "fine_labels", 100)


def make_cifar(root, monkeypatch, kind, key, classes):
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def part(name, n):
        return write(name, {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), key: list(range(n))})

    monkeypatch.setattr(kind, "train_list", [part(name, classes) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [part(name, 7) for name, _ in kind.test_list])
    names = write(kind.meta["filename"], {kind.meta["key"]: [f"class {k}" for k in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": names[1]})
    return root


def test_cifar100_reads_the_real_format(cifar100, capfd):
    loaded = data.load("cifar100", cifar100)
    raw = pickle.loads((cifar100 / "cifar-100-python" / "test").read_bytes())["data"]
    expected = raw[3].reshape(3, 32, 32).transpose(1, 2, 0)  # planes of red, green, blue
    assert np.array_equal(loaded.test.images[3].numpy(), expected)
    assert (
        loaded.num_classes == 100 and len(loaded.train.labels) == 100 and loaded.test.labels.tolist() == list(range(7))
    )
    assert loaded.mean == (0.5071, 0.4867, 0.4408) and loaded.std == (0.2675, 0.2565, 0.2761)
    assert capfd.readouterr().out == ""


def test_cifar10_reads_the_real_format(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels", 10)
    loaded = data.load("cifar10", tmp_path)
    assert loaded.num_classes == 10 and len(loaded.train.labels) == 50
    assert loaded.mean != (0.5071, 0.4867, 0.4408)


@pytest.fixture
def no_download(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


@pytest.mark.parametrize("name, file", [("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz")])
def test_no_network_says_where_to_put_the_file(name, file, tmp_path, no_download):
    with pytest.raises(UserError, match=f"put {file} .* into {tmp_path}.*--dataset digits"):
        data.load(name, tmp_path)


def test_a_damaged_cifar_is_named(cifar100, no_download):
    with open(cifar100 / "cifar-100-python" / "train", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="cifar-100-python is incomplete or damaged"):
        data.load("cifar100", cifar100)


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
        (tmp_path / "linked" / part / "dog").symlink_to(tree / part / "dog")
    loaded = data.load("folder", tmp_path / "linked")
    assert loaded.classes == ("dog",) and len(loaded.train.labels) == 3


@pytest.fixture
def decodes(monkeypatch):
    """How many images were decoded."""
    counted, read = [], images.read_image

    def count(path, size):
        counted.append(path)
        return read(path, size)

    monkeypatch.setattr(images, "read_image", count)
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


@pytest.mark.parametrize("change", ["content", "added", "removed", "renamed", "moved"])
def test_a_changed_folder_is_noticed(tree, decodes, change):
    data.load("folder", tree)
    image = tree / "train" / "dog" / "2.png"
    if change == "content":
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
    if change == "moved":
        assert loaded.train.labels.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_is_made_anew(tree, decodes, damage):
    expected = data.load("folder", tree)
    cache = tree / ".decoded_32.npz"
    cache.write_bytes(cache.read_bytes()[:-500] if damage is None else damage)
    loaded = data.load("folder", tree)
    assert len(decodes) == 16 and loaded.train.images.equal(expected.train.images)


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


def test_an_empty_class_is_named(tree):
    for path in (tree / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="test/dog holds no images"):
        data.load("folder", tree)


def test_an_empty_split_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train holds no images"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("part, other", [("train", "test"), ("test", "train")])
def test_differing_classes_are_named(tree, part, other):
    save_image(tree / part / "eel" / "0.png")
    with pytest.raises(UserError, match=f"classes in {part}/ that are not in {other}/: eel"):
        data.load("folder", tree)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tree, content):
    image = tree / "train" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=f"cannot read the image {image}"):
        data.load("folder", tree)
    assert not (tree / ".decoded_32.npz").exists()


def test_a_grey_image_of_16_bits_is_scaled(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(path)
    assert np.asarray(data._read_image(path, 8)).flatten().tolist() == [77] * 192  # 20000 / 257


def test_a_rotated_photograph_is_upright(tmp_path):
    path, image = tmp_path / "a.png", Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 0, 0))
    image.getexif()[0x0112] = 6  # the camera was turned: show it by 90 degrees clockwise
    image.save(path, exif=image.getexif())
    assert np.asarray(data._read_image(path, 8))[0, 7].tolist() == [255, 0, 0]


def test_a_change_of_one_pixel_or_label_is_another_data_set(digits):
    images, labels = digits.test.images.clone(), digits.test.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] ^= 1
    others = [data.Split(images, digits.test.labels), data.Split(digits.test.images, labels)]
    prints = {dataclasses.replace(digits, test=test).fingerprint for test in [digits.test, *others]}
    assert len(prints) == 3
