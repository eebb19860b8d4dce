"""Data sets, batches, views: from files of the real formats, without a network."""

import dataclasses
import hashlib
import os
import pickle
import shutil
import urllib.error
import warnings

import numpy as np
import pytest
import torch
from cifar_files import COPIES, class_names, make_small, write_bare
from PIL import Image, PngImagePlugin
from torchvision import transforms
from torchvision.transforms import functional

import data
from util import cifar, images
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
    content = b"".join(
        part.numpy().tobytes() for split in (digits.train, digits.test) for part in (split.images, split.labels)
    )
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


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_cifar_from_any_copy_is_the_same(tmp_path, monkeypatch, name, capfd):
    parts, prints = make_small(monkeypatch, name), set()
    for number, write in enumerate(COPIES.values()):
        write(tmp_path / str(number), name, parts) if number else write(tmp_path / "0", name, parts)
        loaded = data.load(name, tmp_path / str(number))
        assert loaded.name == name and loaded.classes == tuple(class_names(name))
        assert loaded.train.images.is_contiguous() and loaded.train.labels.dtype == torch.int64
        prints.add((loaded.fingerprint, loaded.test_fingerprint))
        for split, (pixels, labels) in zip((loaded.train, loaded.test), parts, strict=True):
            given = sorted(zip(split.labels.tolist(), (image.numpy().tobytes() for image in split.images), strict=True))
            assert given == sorted(zip(labels.tolist(), (image.tobytes() for image in pixels), strict=True))
    assert len(prints) == 1
    reference = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert ((loaded.mean, loaded.std) == reference) == (name == "cifar100")
    said = capfd.readouterr()
    assert said.out == "" and ("not the official files of CIFAR-10" in said.err) == (name == "cifar10")


def test_the_real_ones_are_known():
    """By their published numbers, and CIFAR-100 by its content."""
    assert cifar.KINDS["cifar100"].counts == cifar.KINDS["cifar10"].counts == (50_000, 10_000)
    assert [digest[:8] for digest in cifar.KINDS["cifar100"].digests] == ["36ce7a70", "d3cd5d87"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p, y: (p[1:], y[1:]),
            r"is not the whole of CIFAR-100: 199 of 200 training images, 2 of each class \(.* 1\)",
        ),
        (lambda p, y: (p, np.where(y == 5, 6, y)), "class005 has 0, class006 has 4"),
        (lambda p, y: (p ^ (np.arange(200) == 3).astype(np.uint8)[:, None, None, None], y), "other pixels or labels"),
        (lambda p, y: (p, np.roll(y, 1)), "other pixels or labels among its training images"),
    ],
)
def test_a_cifar100_that_is_none_is_told(tmp_path, monkeypatch, change, message):
    train, test = make_small(monkeypatch, "cifar100")
    write_bare(tmp_path, "cifar100", [change(*train), test])
    with pytest.raises(UserError, match=message):
        data.load("cifar100", tmp_path)


def test_images_of_other_classes_are_no_cifar100(tree):
    with pytest.raises(UserError, match="is not CIFAR-100: it has 2 classes, not 100; --dataset folder"):
        data.load("cifar100", tree)


@pytest.mark.parametrize("damage", ["garbage", "missing", "code", "another format"])
def test_damaged_cifar_files_are_told(tmp_path, monkeypatch, damage):
    write_bare(tmp_path / "x", "cifar100", make_small(monkeypatch, "cifar100"))
    file = tmp_path / "x" / "train"
    if damage == "missing":
        (tmp_path / "x" / "meta").unlink()
    else:
        evil = b"cos\nsystem\n(S'touch ran'\ntR."
        odd = pickle.dumps({"data": np.zeros((2, 9), np.uint8), "fine_labels": [0, 1]})
        file.write_bytes({"garbage": b"x", "code": evil, "another format": odd}[damage])
    words = {"missing": "lacks meta; train, test and meta belong there", "code": "it names os.system|posix.system"}
    words |= {
        "garbage": "train is no file of CIFAR-100, or damaged",
        "another format": "not in the format of CIFAR-100",
    }
    with pytest.raises(UserError, match=words[damage]):
        data.load("cifar100", tmp_path)


def test_a_cut_archive_is_told(tmp_path, monkeypatch):
    COPIES["archive"](tmp_path, "cifar100", make_small(monkeypatch, "cifar100"))
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cifar-100-python.tar.gz is damaged .*delete it"):
        data.load("cifar100", tmp_path)


@pytest.fixture
def no_download(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)


@pytest.mark.parametrize("name, file", [("cifar100", "cifar-100-python.tar.gz"), ("cifar10", "cifar-10-python.tar.gz")])
def test_no_network_says_where_to_put_the_file(name, file, tmp_path, no_download):
    with pytest.raises(UserError, match=f"put {file} .* into {tmp_path}.*--dataset digits"):
        data.load(name, tmp_path)


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
    loaded = data.load("folder", tmp_path / "linked")
    assert loaded.classes == ("cat", "dog") and len(loaded.train.labels) == 6


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


# mistakes


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("mnist", None, "unknown data set mnist; there are cifar100, cifar10"),
        ("digits", 16, "--image_size: the images of digits have a fixed size"),
        ("folder", 4, "--image_size 4 is too small"),
        ("folder", None, "train is not there; .* must hold train/<class>"),
        ("tiny_imagenet", None, "train is not there; .* must hold train/<class>"),
    ],
)
def test_mistakes(name, size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        data.load(name, tmp_path, size)


def test_an_empty_split_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train holds no images"):
        data.load("folder", tmp_path)


def test_one_class_alone_is_refused(tree):
    shutil.rmtree(tree / "train" / "dog")
    with pytest.raises(UserError, match="holds one class alone, cat"):
        data.load("folder", tree)


def test_a_test_class_that_is_not_learnt_is_named(tree):
    save_image(tree / "test" / "eel" / "0.png")
    with pytest.raises(UserError, match="classes that are not to be learnt: eel"):
        data.load("folder", tree)


def test_a_class_without_test_images_is_tested_without(tree, capfd):
    save_image(tree / "train" / "eel" / "0.png")
    (tree / "test" / "dog" / "0.png").unlink()
    loaded = data.load("folder", tree)
    assert loaded.classes == ("cat", "dog", "eel") and loaded.test.labels.tolist() == [0]
    assert "no test images of 2 classes, which are tested without: dog, eel" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "testing"])
def test_other_names_of_test(tree, name, capfd):
    (tree / "test").rename(tree / name)
    assert data.load("folder", tree).test.labels.tolist() == [0, 1]
    assert f"the test images are those of {tree / name}" in capfd.readouterr().err


def test_test_comes_before_val_which_is_said(tree, capfd):
    save_image(tree / "val" / "cat" / "0.png")
    assert len(data.load("folder", tree).test.labels) == 2
    assert "are those of" in (told := capfd.readouterr().err) and "val is left out" in told


def test_folders_as_people_have_them(tree, tmp_path, capfd):
    """One level down, images in folders below the class, what systems leave behind, a link that leads in a circle."""
    expected = data.load("folder", tree)
    (tree / ".decoded_32.npz").unlink()
    deep = tree / "train" / "cat" / "images" / "more"
    deep.mkdir(parents=True)
    (tree / "train" / "cat" / "2.png").rename(deep / "2.png")
    (deep / "circle").symlink_to(tree / "train" / "cat")
    for junk in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        save_image(tree / "train" / junk / "x.png")
        save_image(tree / "train" / "dog" / junk / "x.png")
    for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (tree / "train" / "dog" / junk).write_bytes(b"junk")
    loaded = data.load("folder", tmp_path)
    assert loaded.classes == expected.classes and loaded.train.labels.equal(expected.train.labels)
    assert sorted(loaded.train.images.flatten(1).tolist()) == sorted(expected.train.images.flatten(1).tolist())
    assert capfd.readouterr().err == ""


def test_what_is_left_out_is_said(tree, capfd):
    (tree / "train" / "cat" / "notes.txt").write_text("no image")
    (tree / "train" / "dog" / "page.pdf").write_text("no image")
    (tree / "train" / "loose.png").write_bytes(b"")
    (tree / "train" / "eel").mkdir()
    assert len(data.load("folder", tree).train.labels) == 6
    told = capfd.readouterr().err
    assert "3 files are left out" in told and "notes.txt" in told and "page.pdf" in told and "loose.png" in told
    assert "1 classes without images are left out: eel" in told


@pytest.mark.parametrize(
    "form", ["JPEG .jfif", "JPEG .jpe", "PPM .pgm", "AVIF .avif", "JPEG2000 .jp2", "PNG", "TGA .tga"]
)
def test_images_by_any_name_are_read(tree, form):
    kind, _, suffix = form.partition(" ")
    image = tree / "train" / "cat" / "0.png"
    Image.open(image).convert("L" if suffix == ".pgm" else "RGB").save(image.with_name(f"0{suffix}"), kind)
    image.unlink()
    assert len(data.load("folder", tree).train.labels) == 6


def test_names_that_are_not_utf8(tree, script):
    for part in ("train", "test"):
        name = os.path.join(os.fsencode(tree / part), b"caf\xe9")
        os.rename(tree / part / "cat", name)
        os.rename(os.path.join(name, b"0.png"), os.path.join(name, b"\xff.png"))
    loaded = data.load("folder", tree)
    assert loaded.classes == ("caf\\xe9", "dog") and loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    flags = ["--dataset", "folder", "--data_dir", tree, "--image_size", 8, "--epochs", 1, "--batch_size", 6]
    assert script("train.py", "--model_job", "student", *flags).code == 0
    assert script("test.py", "--model_job", "student", *flags[:6]).code == 0


@pytest.mark.parametrize("layout", ["annotated", "classes", "classes/images"])
@pytest.mark.parametrize("name", ["tiny_imagenet", "folder"])
def test_layouts_of_tiny_imagenet(tmp_path, layout, name):
    root = tmp_path / "tiny-imagenet-200"
    for c, label in enumerate(["n01", "n02"]):
        for k in range(2):
            save_image(root / "train" / label / "images" / f"{label}_{k}.JPEG", 10 * c + k, (64, 64))
        (root / "train" / label / f"{label}_boxes.txt").write_text("no image, and known to be none")
        here = {"annotated": "images", "classes": label, "classes/images": f"{label}/images"}[layout]
        save_image(root / "val" / here / f"val_{c}.JPEG", 50 + c, (64, 64))
        save_image(root / "test" / "images" / f"test_{c}.JPEG", 90, (64, 64))  # without labels
    if layout == "annotated":
        lines = "val_0.JPEG\tn01\t0\t0\t62\t62\nval_1.JPEG\tn02\t0\t0\t62\t62\n"
        (root / "val" / "val_annotations.txt").write_text(lines)
    loaded = data.load(name, tmp_path, 16)
    assert loaded.classes == ("n01", "n02") and loaded.train.labels.tolist() == [0, 0, 1, 1]
    assert loaded.test.labels.tolist() == [0, 1] and (loaded.test.images[:, 0, 0, 0] < 60).all()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tree, content):
    image = tree / "train" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=f"cannot read the image {image}"):
        data.load("folder", tree)
    assert not (tree / ".decoded_32.npz").exists()
    others = [tree / "train" / "cat" / "0.png", tree / "test" / "dog" / "0.png"]
    for path in others:
        path.write_bytes(b"")
    for stream in (False, True):
        with pytest.raises(UserError, match="images can't be read: .*mend or remove them") as error:
            data.load("folder", tree, stream=stream)
        told = str(error.value)
        assert "3 images" in told and all(str(path) in told for path in (image, *others))


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        (20000, np.uint16, 77),  # 20000 / 257
        (20000, np.int32, 77),
        (200, np.int32, 200),
        (2**31 - 1, np.int32, 127),
        (0.5, np.float32, 127),
        (200.0, np.float32, 200),
        (20000.0, np.float32, 77),
    ],
)
def test_grey_images_of_many_bits_are_scaled(tmp_path, value, kind, expected):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((8, 8), value, kind)).save(path)
    assert np.asarray(data._read_image(path, 8)).flatten().tolist() == [expected] * 192


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1e6), (0.0, np.nan)])
def test_grey_values_of_an_unknown_range_are_refused(tmp_path, values):
    pixels = np.zeros((8, 8), np.float32)
    pixels[0, :2] = values
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: its values go from"):
        data._read_image(tmp_path / "a.tif", 8)


def test_large_texts_and_broken_exif_are_no_failure(tmp_path, capfd):
    text = PngImagePlugin.PngInfo()
    text.add_text("xml", "a" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    for name in ("a.png", "b.jpg"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            assert data._read_image(tmp_path / name, 8).size == (8, 8)
        assert not shown


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


# for testing a checkpoint, and held-out images


def test_without_train_a_checkpoint_can_be_tested(tree):
    whole = data.load("folder", tree)
    shutil.rmtree(tree / "train")
    with pytest.raises(UserError, match="train is not there"):
        data.load("folder", tree)
    for stream in (False, True):
        known = {"classes": ("cat", "dog"), "mean": whole.mean, "std": whole.std}
        loaded = data.load("folder", tree, stream=stream, **known)
        assert loaded.train is None and loaded.test.labels.equal(whole.test.labels)
        assert loaded.mean == whole.mean and loaded.test_fingerprint == whole.test_fingerprint


def test_labels_are_numbered_by_the_checkpoints_classes(tree):
    whole = data.load("folder", tree)
    loaded = data.load("folder", tree, classes=("eel", "dog", "cat"), mean=whole.mean, std=whole.std)
    assert loaded.test.labels.tolist() == [2, 1] and loaded.classes == ("eel", "dog", "cat")
    with pytest.raises(UserError, match="other classes than the checkpoint's: dog; it knows cat, eel"):
        data.load("folder", tree, classes=("cat", "eel"), mean=whole.mean, std=whole.std)


def test_held_out_images_are_of_each_class_and_always_the_same(digits):
    train, val = data.held_out(digits.train, 0.2, 10)
    assert len(train.labels) + len(val.labels) == 1500
    for part, share in ((train, 0.8), (val, 0.2)):
        counts = part.labels.bincount() / digits.train.labels.bincount()
        assert (counts - share).abs().max() < 0.005
    pixels = {image.numpy().tobytes() for image in val.images}
    assert len(pixels) == len(val.labels) and not pixels & {image.numpy().tobytes() for image in train.images}
    again = data.held_out(digits.train, 0.2, 10)[1]
    assert again.images.equal(val.images) and again.digest == val.digest != train.digest != digits.train.digest
    with pytest.raises(UserError, match="holds out no image"):
        data.held_out(digits.train, 0.001, 10)
    with pytest.raises(UserError, match="leaves a class of 1 images without any"):
        data.held_out(data.Split(digits.train.images[:12], torch.arange(12)), 0.6, 12)


def test_streamed_images_are_held_out_alike(tree):
    parts = [data.held_out(data.load("folder", tree, stream=stream).train, 0.3, 2) for stream in (False, True)]
    for decoded, streamed in zip(*parts, strict=True):
        assert decoded.labels.equal(streamed.labels) and decoded.digest == streamed.digest
        assert next(streamed.images.read([torch.arange(len(streamed.labels))])).equal(decoded.images)
