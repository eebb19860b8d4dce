"""Image files as people have them: folders, names, formats, pixels."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import data
from images import folders
from util.runtime import UserError


def save(path, value=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 100, 255 - value)).save(path, **options)
    return path


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes, two images of each for training and one for testing."""
    root = tmp_path / "images"
    for c, label in enumerate(["cat", "dog"]):
        for k in range(2):
            save(root / "train" / label / f"{k}.png", 10 * c + k)
        save(root / "test" / label / "0.png", 100 + c)
    return root


def load(root, **options):
    return data.load("folder", root, 8, **options)


def counts(root):
    loaded = load(root)
    return len(loaded.train.labels), len(loaded.test.labels)


# folders


def test_plain_folders_are_read_without_a_word(tree, capfd):
    for path in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "@eaDir/0.png", ".ipynb_checkpoints/0.png"):
        for folder in (tree, tree / "train", tree / "train" / "cat"):
            save(folder / path, format="PNG")
    save(tree / "__MACOSX" / "train" / "cat" / "0.png")
    assert counts(tree) == (4, 2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "testing", "Test", "VAL"])
def test_other_names_of_the_test_folder_are_taken_and_said(tree, name, capfd):
    expected = load(tree).fingerprint
    (tree / "test").rename(tree / name)
    (tree / "train").rename(tree / "Training")
    assert load(tree).fingerprint == expected
    assert capfd.readouterr().err == f"images: {tree}/Training and {tree}/{name}\n"


def test_of_test_and_val_the_first_is_taken_and_said(tree, capfd):
    shutil.copytree(tree / "train", tree / "val")
    assert counts(tree) == (4, 2)
    assert capfd.readouterr().err == f"{tree}/val is not used\n"


def test_a_test_folder_without_classes_is_passed_over(tree, capfd):
    (tree / "test").rename(tree / "val")
    for k in range(3):
        save(tree / "test" / "images" / f"{k}.png")
        save(tree / "testing" / f"{k}.png")
    assert counts(tree) == (4, 2)
    assert f"{tree}/val" in capfd.readouterr().err


@pytest.mark.parametrize("below", ["set", "set/train-and-test"])
def test_the_root_may_be_one_level_down(tree, below, capfd, tmp_path):
    (tmp_path / "data" / below).parent.mkdir(parents=True)
    tree.rename(tmp_path / "data" / below)
    (tmp_path / "data" / "empty").mkdir()
    root = tmp_path / "data" if below == "set" else tmp_path / "data" / "set"
    assert counts(root) == (4, 2)
    assert capfd.readouterr().err.startswith(f"images: {tmp_path}/data/{below}/train and")


def test_several_roots_one_level_down_are_named(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "more")
    with pytest.raises(UserError, match="holds several data sets: images, more; give one of them"):
        load(tmp_path)


def test_a_folder_in_a_folder_of_its_own_name_is_entered(tree):
    (tree / "train").rename(tree / "t")
    (tree / "train").mkdir()
    (tree / "t").rename(tree / "train" / "train")
    assert load(tree).classes == ("cat", "dog")


def test_images_may_lie_deeper(tree):
    expected = load(tree)
    for label in ("cat", "dog"):
        folder = tree / "train" / label
        save(folder / "images" / "large" / "1.png").unlink()
        (folder / "0.png").rename(folder / "images" / "0.png")
        (folder / "1.png").rename(folder / "images" / "large" / "1.png")
    assert load(tree).fingerprint == expected.fingerprint


def test_links_that_go_round_end(tree):
    folder = tree / "train" / "cat"
    (folder / "round").symlink_to(folder)
    (folder / "up").symlink_to(tree / "train")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "back").symlink_to(folder)
    assert counts(tree) == (4, 2)


@pytest.mark.skipif(os.name != "posix", reason="names are UTF-16")
def test_names_need_not_be_utf8(tree):
    for part in ("train", "test"):
        folder = os.fsencode(tree / part) + b"/caf\xe9"
        os.rename(tree / part / "cat", folder)
        os.rename(folder + b"/0.png", folder + b"/\xff.png")
    loaded = load(tree)
    assert loaded.classes == ("caf\\xe9", "dog") and len(loaded.train.labels) == 4
    "".join(loaded.classes).encode()
    assert load(tree, stream=True).fingerprint == loaded.fingerprint
    Path(os.fsdecode(os.fsencode(tree / "train") + b"/caf\xe9/\xff.png")).write_bytes(b"")
    with pytest.raises(UserError) as error:
        load(tree)
    assert "caf\\xe9/\\xff.png" in str(error.value)


def test_an_accent_written_in_two_ways_is_one_class(tree):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        (tree / part / "cat").rename(tree / part / unicodedata.normalize(form, "café"))
    assert load(tree).classes == ("café", "dog")


# classes


def test_a_class_without_test_images_is_told(tree, capfd):
    save(tree / "train" / "eel" / "0.png")
    (tree / "test" / "eel").mkdir()
    loaded = load(tree)
    assert loaded.classes == ("cat", "dog", "eel") and loaded.test.labels.tolist() == [0, 1]
    assert capfd.readouterr().err == "no test images of 1 of 3 classes: eel; tested without\n"


def test_empty_class_folders_are_told(tree, capfd):
    for path in ("train/empty", "test/eel"):
        (tree / path).mkdir()
    assert load(tree).num_classes == 2
    assert capfd.readouterr().err == "class folders left out, without images: empty, eel\n"


def test_a_test_class_that_train_lacks_is_named(tree):
    save(tree / "test" / "eel" / "0.png")
    with pytest.raises(UserError, match="classes in test/ that are not in train/: eel"):
        load(tree)


def test_a_test_folder_of_other_classes_is_named(tree):
    (tree / "test" / "cat").rename(tree / "test" / "eel")
    (tree / "test" / "dog").rename(tree / "test" / "fox")
    with pytest.raises(UserError, match="classes in test/ that are not in train/: eel, fox"):
        load(tree)


def test_one_class_alone_is_refused(tree):
    shutil.rmtree(tree / "train" / "dog")
    shutil.rmtree(tree / "test" / "dog")
    with pytest.raises(UserError, match="has one class alone, cat"):
        load(tree)


@pytest.mark.parametrize("test", [None, "flat"])
def test_no_test_images_are_told(tree, test):
    shutil.rmtree(tree / "test")
    if test:
        save(tree / "test" / "0.png")
    with pytest.raises(UserError, match=f"{tree}/test (is not there|holds no images in class folders); .*test/<class>"):
        load(tree)


def test_home_is_expanded(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert counts("~/images") == (4, 2)
    with pytest.raises(UserError, match="--data_dir ~nobody-here/x"):
        load("~nobody-here/x")


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path):
    """Tiny ImageNet as it is unpacked, of two classes, with its notes and its test images of no class."""
    root = tmp_path / "tiny"
    for c, label in enumerate(["n01", "n02"]):
        for k in range(2):
            save(root / "train" / label / "images" / f"{label}_{k}.JPEG", 10 * c + k)
        (root / "train" / label / f"{label}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
        save(root / "val" / "images" / f"val_{c}.JPEG", 50 + c)
        save(root / "test" / "images" / f"test_{c}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return root


@pytest.mark.parametrize("deeper", ["", "images"])
def test_tiny_imagenet_may_be_sorted_into_classes(tiny, tmp_path, deeper, capfd):
    expected = data.load("tiny_imagenet", tiny)
    assert capfd.readouterr().err == "" and expected.test.labels.tolist() == [1, 0]
    for k, label in ((0, "n02"), (1, "n01")):
        (tiny / "val" / label / deeper).mkdir(parents=True)
        (tiny / "val" / "images" / f"val_{k}.JPEG").rename(tiny / "val" / label / deeper / f"val_{k}.JPEG")
    (tiny / "val" / "images").rmdir()
    for root in (tiny, tmp_path):
        loaded = data.load("tiny_imagenet", root)
        assert loaded.classes == expected.classes and loaded.test.labels.tolist() == [0, 1]
        assert loaded.test.images.equal(expected.test.images.flip(0))


def test_tiny_imagenet_is_a_folder_of_images(tiny, capfd):
    loaded = data.load("folder", tiny, 64)
    assert loaded.fingerprint == data.load("tiny_imagenet", tiny).fingerprint
    assert capfd.readouterr().err == f"images: {tiny}/train and {tiny}/val\n"


def test_a_listed_image_that_is_missing_is_named(tiny):
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match="cannot read the image .*val_1.JPEG"):
        data.load("tiny_imagenet", tiny)


# formats


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.jfif", {"format": "JPEG"}), ("a.jpe", {"format": "JPEG"}), ("a.pgm", {"format": "PPM"}),
        ("a.jp2", {"format": "JPEG2000"}), ("a.avif", {"format": "AVIF"}), ("a.TIF", {"format": "TIFF"}),
        ("a.webp", {"format": "WEBP"}), ("a.bmp", {"format": "BMP"}), ("a.tga", {"format": "TGA"}),
        ("a", {"format": "JPEG"}), ("a.jpg?size=1", {"format": "JPEG"}), ("a.image", {"format": "GIF"}),
        ("a.png", {"format": "JPEG"}),
    ],
)  # fmt: skip
def test_an_image_of_any_format_is_read(tree, name, options, capfd):
    if options["format"] not in {*Image.OPEN, *folders._formats().readable}:
        pytest.skip("this Pillow can't write it")
    save(tree / "train" / "cat" / name, 100, **options)
    assert counts(tree) == (5, 2)
    assert capfd.readouterr().err == ""


def test_what_is_no_image_is_told(tree, capfd):
    for name in ("a.txt", "b.csv", "c", "d.eps", "e.h5"):
        (tree / "train" / "cat" / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    os.mkfifo(tree / "train" / "dog" / "pipe.png")
    save(tree / "train" / "stray.png")
    assert counts(tree) == (4, 2)
    told = capfd.readouterr().err.splitlines()
    assert told == [
        "6 files left out, no images: cat/a.txt, cat/b.csv, cat/c and 3 more",
        "1 file left out, in no class folder: train/stray.png",
    ]


@pytest.mark.parametrize("count", [2, 9])
def test_all_unreadable_images_are_named_at_once(tree, count):
    paths = [tree / "train" / "cat" / f"bad{k}.jpg" for k in range(count - 1)]
    for path in paths:
        path.write_bytes(b"")
    (tree / "test" / "dog" / "gone.png").symlink_to(tree / "nowhere")
    more = " and 4 more" if count == 9 else f", {tree}/test/dog/gone.png"
    with pytest.raises(UserError, match=f"^{count} images can't be read: {paths[0]}.*{more}; mend or remove them$"):
        load(tree)
    assert not (tree / ".decoded_8.npz").exists()


@pytest.mark.parametrize("part", [0.7, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_cut_image_is_unreadable(tmp_path, kind, part):
    path = tmp_path / "a"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=f"cannot read the image {path}: .*; mend or remove it"):
        folders.read_image(path, 8)


def test_pillows_warnings_and_limits_stay_out_of_the_way(tree, capfd, recwarn):
    text = PngImagePlugin.PngInfo()
    text.add_text("xml", "a" * 2_000_000, zip=True)
    save(tree / "train" / "cat" / "text.png", pnginfo=text)
    save(tree / "train" / "cat" / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    palette = Image.new("P", (8, 8))
    palette.save(tree / "train" / "cat" / "palette.png", transparency=bytes([0, 128, 255]))
    folders._formats.cache_clear()  # pytest's own filters came after those of the first call
    assert counts(tree) == (7, 2)
    assert capfd.readouterr().err == "" and not recwarn.list
    assert Image.MAX_IMAGE_PIXELS is None  # so that photographs of 180 million pixels and more are read


# pixels


def pixels(path, size=8):
    return np.asarray(folders.read_image(path, size))


RAMP = np.linspace(0, 1, 4096).reshape(64, 64)


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32), (RAMP * 255).astype(np.float32), (RAMP * 65535).astype(np.float32),
        (RAMP * 2 - 1).astype(np.float32), (RAMP * 1.01 - 0.005).astype(np.float32), (RAMP * 1e6).astype(np.float32),
        (RAMP * 255).astype(np.int32), (RAMP * 65535).astype(np.int32), (RAMP * (2**31 - 1)).astype(np.int32),
        (RAMP * 100_000).astype(np.int32), (RAMP > 0.5).astype(np.int32), (RAMP * 65535).astype(np.uint16),
        (RAMP * 4095).astype(np.uint16), (RAMP * 255).astype(np.uint8), RAMP > 0.5,
    ],
)  # fmt: skip
def test_grey_values_of_any_range_are_scaled(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    seen = pixels(tmp_path / "a.tif", 64)
    steps = np.abs(seen[..., 0] - (255 * RAMP if seen.size and len(np.unique(values)) > 2 else 255 * (RAMP > 0.5)))
    assert steps.max() <= 4 and (seen == seen[..., :1]).all()


@pytest.mark.parametrize(
    "values", [np.float32([[0, np.nan]]), np.float32([[0, np.inf]]), np.float32([[-1000, 3000]]), np.int32([[-5, 9]])]
)
def test_grey_values_that_cannot_be_told_are_refused_by_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"cannot read the image .*a.tif: (it holds NaN|what is black and white in)"):
        folders.read_image(tmp_path / "a.tif", 8)


def test_a_grey_image_of_16_bits_is_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").flatten().tolist() == [77] * 192  # 20000 / 257


@pytest.mark.parametrize("value, seen", [(np.float32(0.5), 128), (np.float32(100), 100), (np.int32(100), 100)])
def test_a_grey_image_stays_grey(tmp_path, value, seen):
    Image.fromarray(np.full((8, 8), value)).save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif") == seen).all()


def test_a_black_image_is_black(tmp_path, recwarn):
    for values in (np.zeros((8, 8), np.float32), np.zeros((8, 8), np.int32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert pixels(tmp_path / "a.tif").max() == 0 and not recwarn.list


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("LA", (10, 255), (10, 10, 10)), ("LA", (10, 0), (255, 255, 255)), ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("1", 1, (255, 255, 255)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)  # fmt: skip
def test_other_modes_become_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8), colour).save(path)
    assert pixels(path)[3, 3].tolist() == list(expected)


def test_a_palettes_transparent_colour_is_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    seen = pixels(tmp_path / "a.png")
    assert seen[0, 0].tolist() == [255] * 3 and seen[5, 5].tolist() == [10, 20, 30]


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_rotated_photograph_is_upright(tmp_path, mode):
    image = Image.new("RGB", (8, 8)) if mode == "RGB" else Image.fromarray(np.zeros((8, 8), np.uint16))
    image.putpixel((0, 0), (255, 0, 0) if mode == "RGB" else 65535)
    image.getexif()[0x0112] = 6  # the camera was turned: show it by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=image.getexif())
    seen = pixels(tmp_path / "a.png")
    assert seen[0, 7, 0] == 255 and seen[..., 0].sum() == 255
