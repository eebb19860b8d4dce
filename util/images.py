"""Image files: found in folders as people have them, decoded, and what was learnt of them kept beside them."""

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from util import files
from util.processes import local_size
from util.runtime import UserError, say

CACHE_FORMAT = 3
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that fits is taken
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file, class, four numbers

# What systems and programs leave in folders; passed over without a word, as is all that begins with a dot.
JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "icon\r"}
# Formats that Pillow opens but can't decode by itself.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
NAMED = 5  # how many files a message names
AHEAD = 2  # how many batches are decoded before they are asked for

# These are the user's own files: large ones, and ones with long texts in them, are no attack.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
# Of damaged EXIF data and the like, without the image's name; what can't be decoded is told of by name.
warnings.filterwarnings("ignore", module=r"PIL\.")

Statistics = tuple[float, float, float]  # one value for each of red, green and blue
Files = list[tuple[Path, str]]  # images, each with its class
Failed = list[tuple[Path, UserError]]  # images that can't be read, and why


class Found(NamedTuple):
    """The image files of a data set. train is None where only the test images are there."""

    root: Path
    train: Files | None
    test: Files


class Known(NamedTuple):
    """What one pass over streamed images told: the training pixels' statistics, and a digest of each part's pixels."""

    mean: Statistics
    std: Statistics
    train: str
    test: str


# finding


def find(data_dir: Path, classes: Sequence[str] | None = None) -> Found:
    """The images of train/<class>/ and test/<class>/ (or val/, valid/, validation/), at any depth below the class.

    The two lie in data_dir or one level down; class folders may be links. What is left out is told of in a line.
    classes: those of a checkpoint that is to be tested, which needs no train/. Raises UserError where images are
    missing, or a class of test/ is none of train/.
    """
    root = next((root for root in roots(data_dir) if _part(root, TRAIN_NAMES)), None)
    if root is None and classes:
        root = next((root for root in roots(data_dir) if _part(root, TEST_NAMES)), None)
    if root is None:
        raise UserError(
            f"{data_dir / 'train'} is not there; {data_dir} must hold train/<class>/<images> and test/<class>/<images>"
        )
    folder = _part(root, TRAIN_NAMES)
    train = _class_files(folder) if folder else None
    if train is not None and len({label for _, label in train}) < 2:
        raise UserError(f"{folder} holds one class alone, {train[0][1]}; there is nothing to tell apart")
    known = {label for _, label in train} if train else set(classes)
    return Found(root, train, _test_files(root, known))


def roots(data_dir: Path) -> list[Path]:
    """The folder, then those in it."""
    try:
        inside = sorted(path for path in data_dir.iterdir() if path.is_dir() and not _is_junk(path))
    except OSError:  # missing, or no folder
        inside = []
    return [data_dir, *inside]


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of the first of these names, whatever its case."""
    there = {path.name.lower(): path for path in roots(root)[1:]}
    return next((there[name] for name in names if name in there), None)


def _test_files(root: Path, known: set[str]) -> Files:
    """The test images, of the folder whose classes are those of the training images; says so where it is not test/."""
    folders = [folder for name in TEST_NAMES if (folder := _part(root, (name,)))]
    if not folders:
        raise UserError(
            f"{root / 'test'} is not there, nor val, valid or validation; {root} must hold test/<class>/<images>"
        )
    # Tiny ImageNet's test/ has no labels, its val/ has.
    folder = next((folder for folder in folders if known & _labels(folder)), folders[0])
    if folder.name.lower() != "test" or len(folders) > 1:
        others = [other.name for other in folders if other != folder]
        say(f"the test images are those of {folder}" + (f"; {', '.join(others)} is left out" if others else ""))
    found = _class_files(folder)
    there = {label for _, label in found}
    if unknown := sorted(there - known):
        raise UserError(f"{folder} holds classes that are not to be learnt: {some(unknown)}; both parts need the same")
    if missing := sorted(known - there):
        say(f"no test images of {len(missing)} classes, which are tested without: {some(missing)}")
    return found


def _labels(part: Path) -> set[str]:
    if (part / ANNOTATIONS).is_file():
        return {label for _, label in _annotated(part)}
    return {_label(folder) for folder in roots(part)[1:]}


def _class_files(part: Path) -> Files:
    if (part / ANNOTATIONS).is_file() and (part / "images").is_dir():
        return _annotated(part)
    found, others, empty = [], [path for path in _entries(part) if path.is_file()], []
    for folder in roots(part)[1:]:
        images, rest = _images_below(folder)
        found += [(path, _label(folder)) for path in images]
        others += rest
        empty += [] if images else [_label(folder)]
    if not found:
        raise UserError(f"{part} holds no images; it must hold a folder of images for each class")
    if others:
        say(f"{part}: {len(others)} files are left out, as they are no images in a class's folder: {some(others)}")
    if empty:
        say(f"{part}: {len(empty)} classes without images are left out: {some(empty)}")
    return found


def _annotated(part: Path) -> Files:
    """Tiny ImageNet's own layout of its validation images."""
    lines = (part / ANNOTATIONS).read_text().splitlines()
    fields = [line.split("\t") for line in lines if line.strip()]
    return [(part / "images" / field[0], field[1]) for field in fields if len(field) > 1]


def _images_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images in the folder and the folders below it, in order, and the files that are none."""
    images, others, seen, todo = [], [], set(), [folder]
    while todo:
        here = todo.pop()
        if (real := here.resolve()) in seen:  # links that lead in a circle
            continue
        seen.add(real)
        for path in _entries(here):
            if path.is_dir():
                todo.append(path)
            elif not path.name.lower().endswith("_boxes.txt"):  # Tiny ImageNet's, known to be none
                (images if _is_image(path) else others).append(path)
    return sorted(images), others


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not _is_junk(path))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in JUNK


def _is_image(path: Path) -> bool:
    """By its name's ending, or, where that is unknown or missing, by its content."""
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind in Image.OPEN and kind not in UNDECODABLE:
        return True
    try:
        with Image.open(path) as image:
            return image.format not in UNDECODABLE
    except Exception:  # Pillow raises whatever the bytes lead its readers to
        return False


def _label(folder: Path) -> str:
    """The class's name: the folder's, printable even where it is not UTF-8."""
    return os.fsencode(folder.name).decode("utf-8", "backslashreplace")


def some(names: Sequence) -> str:
    text = ", ".join(str(name) for name in names[:NAMED])
    return text + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def key_of(found: Found, size: int) -> str:
    """What changes when an image is added, removed, renamed or written anew, or is to have another size."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size}\n".encode())
    for part, listed in (("train", found.train or []), ("test", found.test)):
        for path, label in listed:
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
            name = os.fsencode(path.relative_to(found.root))
            digest.update(b"\0".join([part.encode(), label.encode(), name, b""]))
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# decoding


def read_image(path: Path, size: int) -> Image.Image:
    """The image in RGB, upright, scaled (Lanczos) to cover size x size and cut to it around its centre.

    Raises UserError for a file that can't be read.
    """
    try:
        with Image.open(path) as image:
            rgb = ImageOps.exif_transpose(_in_8_bits(image)).convert("RGB")
    except Exception as error:  # Pillow raises whatever the bytes lead its readers to
        reason = str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}; mend or remove it") from None
    return rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, which Pillow would cut off at 255, scaled to 8.

    The file does not say which value is white: of integers it is the largest of 8, 16 or 32 bits that holds all of the
    image's, of fractions 1, 255 or 65,535. Raises ValueError for others.
    """
    if not (image.mode in ("I", "F") or image.mode.startswith("I;")):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    whites = {"F": (1, 255, 2**16 - 1), "I": (255, 2**16 - 1, 2**32 - 1)}.get(image.mode, (2**16 - 1,))
    white = next((white for white in whites if high <= white), None)
    if white is None or not low >= 0:
        raise ValueError(f"its values go from {low:g} to {high:g}, of which black and white can't be told")
    scaled = Image.fromarray((values / white * 255).astype(np.uint8))
    scaled.info = image.info
    return scaled


def decode(paths: list[Path], size: int) -> np.ndarray:
    """uint8 (N, size, size, 3), decoded by as many threads as there are cores (Pillow lets go of the lock).

    Raises UserError that names all images that can't be read.
    """
    images, failed = np.empty((len(paths), size, size, 3), np.uint8), []

    def one(index: int) -> None:
        try:
            images[index] = read_image(paths[index], size)
        except UserError as error:
            failed.append((index, error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(one, range(len(paths))):
            pass
    refuse_unreadable([(paths[index], error) for index, error in sorted(failed, key=lambda pair: pair[0])])
    return images


def refuse_unreadable(failed: Failed) -> None:
    """Raise UserError, which names the images that can't be read, where there are any."""
    if len(failed) == 1:
        raise failed[0][1]
    if failed:
        raise UserError(
            f"{len(failed)} images can't be read: {some([path for path, _ in failed])}; mend or remove them"
        )


class ImageFiles:
    """Images on the disk, decoded each time they are asked for: for sets that memory does not hold."""

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.shape = paths, (len(paths), size, size, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: torch.Tensor) -> "ImageFiles":
        """Those of these indices, int64 (n,)."""
        return ImageFiles([self.paths[index] for index in indices.tolist()], self.shape[1])

    def read(self, parts: Iterable[torch.Tensor], failed: Failed | None = None) -> Iterator[torch.Tensor]:
        """The images of each part (indices), uint8 (B, H, W, 3), decoded by threads while the last ones are used.

        Threads share the memory (worker processes need room in /dev/shm, which containers are short of), draw no
        random numbers, and end with the run. Raises UserError for images that can't be read; or puts them into
        `failed`, where that is given, and leaves them out.
        """
        pool, coming = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // local_size())), deque()
        try:
            for part in parts:
                coming.append([pool.submit(self._one, index) for index in part.tolist()])
                if len(coming) > AHEAD:
                    yield self._gathered(coming.popleft(), failed)
            while coming:
                yield self._gathered(coming.popleft(), failed)
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, index: int) -> np.ndarray | tuple[Path, UserError]:
        try:
            return np.asarray(read_image(self.paths[index], self.shape[1]))
        except UserError as error:
            return self.paths[index], error

    @staticmethod
    def _gathered(coming: list[Future], failed: Failed | None) -> torch.Tensor:
        images = [future.result() for future in coming]
        bad = [image for image in images if isinstance(image, tuple)]
        if failed is None:
            refuse_unreadable(bad)
        else:
            failed += bad
        good = [image for image in images if not isinstance(image, tuple)]
        return torch.from_numpy(np.stack(good)) if good else torch.empty(0, 1, 1, 3, dtype=torch.uint8)


# keeping


def decoded(found: Found, size: int, key: str) -> dict[str, np.ndarray]:
    """The pixels of "train" and "test", from the cache beside the files where nothing changed since it was made."""
    cache = found.root / f".decoded_{size}.npz"
    parts = {"train": found.train, "test": found.test}
    names = [name for name, listed in parts.items() if listed is not None]
    images = _read_cache(cache, key, names)
    if images is None:
        paths = [path for name in names for path, _ in parts[name]]
        pixels = decode(paths, size)
        ends = np.cumsum([len(parts[name]) for name in names])[:-1]
        images = dict(zip(names, np.split(pixels, ends), strict=True))
        _write_cache(cache, key, images)
    return images


def _read_cache(path: Path, key: str, names: list[str]) -> dict[str, np.ndarray] | None:
    """The decoded images in the cache, or None where it is missing, damaged or of other images."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _write_cache(path: Path, key: str, images: dict[str, np.ndarray]) -> None:
    """Keep the decoded images; a folder that can't be written costs time at the next start, no more."""
    try:
        with files.replacing(path) as file:
            np.savez(file, key=np.array(key), **images)
    except UserError as error:
        say(f"the decoded images are not kept, the next start decodes them again ({error})")


def known(found: Found, size: int, key: str) -> Known:
    """What streamed images must tell before they are used, from one pass over them, or as kept since the last one."""
    path = found.root / f".statistics_{size}.json"
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return Known(tuple(kept["mean"]), tuple(kept["std"]), kept["train"], kept["test"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    told = _pass_over(found, size)
    try:
        files.write_json({"key": key, **told._asdict()}, path)
    except UserError as error:
        say(f"what the images tell is not kept, the next start reads them all again ({error})")
    return told


def _pass_over(found: Found, size: int) -> Known:
    digests, counts, failed = {}, torch.zeros(3, 256, dtype=torch.int64), []
    for name, listed in (("train", found.train or []), ("test", found.test)):
        images, digest = ImageFiles([path for path, _ in listed], size), hashlib.sha256()
        for part in images.read(torch.arange(len(images)).split(250), failed):
            digest.update(part.numpy())
            counts += _counts(part) if name == "train" else 0
        digests[name] = digest.hexdigest()
    refuse_unreadable(failed)
    return Known(*_from_counts(counts), **digests)


def statistics(images: torch.Tensor) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel of the images, uint8 (N, H, W, 3), pixels taken as 0 to 1.

    In float64, from how often each pixel value occurs, so that it does not matter how the images are parted.
    """
    return _from_counts(_counts(images))


def _counts(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(3)])


def _from_counts(counts: torch.Tensor) -> tuple[Statistics, Statistics]:
    pixels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.double().sum(1, keepdim=True)
    mean = shares @ pixels
    std = (shares @ pixels**2 - mean**2).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0  # a channel of one value: nothing to stretch
    return tuple(mean.tolist()), tuple(std.tolist())
