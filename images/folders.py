"""Image files: found, listed, decoded, and kept decoded beside them."""

import functools
import hashlib
import io
import itertools
import logging
import os
import struct
import unicodedata
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, PngImagePlugin

from images.packed import Row
from util import files, parsed
from util.processes import local_size
from util.runtime import UserError, is_out_of_memory, say
from util.text import printable

TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation", "testing")
# What systems, archives and network drives leave in folders, and Tiny ImageNet's own notes; and all that is hidden.
JUNK = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "@tmp", "@recycle", "#recycle",
    "$recycle.bin", "system volume information", "lost+found", "__pycache__", "val_annotations.txt",
}  # fmt: skip
CACHE_FORMAT = 4
CHUNK = 4  # images that a thread decodes at a time

# The user's own files: a large photograph or a long comment is no attack. Pillow's remarks would not name the image.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
logging.getLogger("PIL").addHandler(logging.NullHandler())

Files = dict[str, list[tuple[Path | Row, str]]]  # for "train" and "test": each image and its class


# finding


class Found(NamedTuple):
    """root: where they lie; files: those of "train" (where it is there) and "test", in a fixed order.

    classes: in their order, where it is not that of their names. listed: the name of the list that they are from, to
    tell what is kept of them from what is kept of other images at the same root.
    """

    root: Path
    files: Files
    classes: tuple[str, ...] | None = None
    listed: str = ""

    def kept(self, name: str) -> Path:
        """Where a file of this name about these images is kept."""
        return self.root / f".{self.listed}_{name}" if self.listed else self.root / f".{name}"


@dataclass
class _Notes:
    """What was left out of a folder of classes."""

    no_images: list[Path] = field(default_factory=list)
    no_class: list[Path] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def find(data_dir: Path, tests: Sequence[str] = TEST, classes: Collection[str] | None = None) -> Found:
    """The images of train/<class>/ and test/<class>/, at any depth, in data_dir or one level down.

    tests: names of the folder of test images, the preferred first. classes: a network's to be tested, which those of
    the test images must be among; train/ may be missing then.
    Says what was left out, and which folders were taken where they are not data_dir/train and data_dir/test.
    Raises UserError for missing folders or images, and for a test class that is none of the classes.
    """
    root = _root(data_dir, tests, classes)
    notes, listing = _Notes(), {}
    train = next(iter(part_folders(root, TRAIN)), None)
    if train is not None:
        listing["train"] = class_files(train, notes)
        if not listing["train"]:
            raise UserError(f"{printable(train)} holds no images; it must hold a folder of images for each class")
    own = {label for _, label in listing.get("train", ())}
    where = "that the network does not know" if classes else f"that are not in {train.name}/"
    wanted = set(classes or own)
    test, listing["test"] = _test_files(root, tests, wanted, where, notes)
    if (train or data_dir / "train", test) != (data_dir / "train", data_dir / tests[0]):
        say(f"images: {' and '.join(printable(folder) for folder in (train, test) if folder)}")
    for other in part_folders(root, tests):
        if other != test and any(class_name(entry.name) in wanted for entry in _entries(other)):
            say(f"{printable(other)} is not used")
    _say_left_out(notes, wanted, {label for _, label in listing["test"]})
    return Found(root, listing)


def roots(data_dir: Path, names: Sequence[str] = TRAIN) -> list[Path]:
    """data_dir where it holds a folder of one of these names, else all folders in it that do."""
    if part_folders(data_dir, names):
        return [data_dir]
    return [folder for folder in folders(data_dir) if part_folders(folder, names)]


def folders(root: Path) -> list[Path]:
    """The root's folders, sorted, but for junk and those that can't be entered; none where it is no folder."""
    below = [Path(entry.path) for entry in _entries(root) if _is_folder(entry)] if root.is_dir() else []
    return [folder for folder in below if os.access(folder, os.R_OK | os.X_OK)]


def _root(data_dir: Path, tests: Sequence[str], classes: Collection[str] | None) -> Path:
    found = roots(data_dir, TRAIN)
    if classes and (not found or part_folders(data_dir, tests)):
        found = roots(data_dir, tests)
    shown = printable(data_dir)
    if len(found) > 1:
        raise UserError(f"{shown} holds several data sets: {some([root.name for root in found])}; give one of them")
    if not found:
        part = tests[0] if classes else "train"
        raise UserError(
            f"{shown}/{part} is not there; {shown} must hold train/<class>/<images> and test/<class>/<images>"
        )
    return found[0]


def part_folders(root: Path, names: Sequence[str]) -> list[Path]:
    """The root's folders of these names, in that order, in whatever case they are written."""
    there: dict[str, Path] = {}
    for folder in folders(root):
        there.setdefault(folder.name.casefold(), folder)
    return [_entered(root / name if (root / name).is_dir() else there[name]) for name in names if name in there]


def _entered(folder: Path) -> Path:
    """Some archives hold train/train/<class>."""
    inside = folders(folder)
    return inside[0] if [below.name.casefold() for below in inside] == [folder.name.casefold()] else folder


def class_files(part: Path, notes: _Notes | None = None) -> list[tuple[Path, str]]:
    """The images in each folder of `part`, and its name as their class; class folders may be links."""
    notes, found = notes or _Notes(), []
    above = {_identity(folder) for folder in (part.resolve(), *part.resolve().parents)}
    for entry in _entries(part):
        if not _is_folder(entry):
            notes.no_class.append(Path(entry.path))
        elif images := list(_images_below(entry.path, set(above), notes)):
            found += [(path, class_name(entry.name)) for path in images]
        else:
            notes.empty.append(class_name(entry.name))
    return found


def images_below(folder: Path) -> list[Path]:
    """The images in the folder, at any depth, in a fixed order; says what was left out. Raises UserError."""
    notes = _Notes()
    found = list(_images_below(str(folder), {_identity(above) for above in folder.resolve().parents}, notes))
    _say_left_out(notes, set(), set())
    return found


def _images_below(folder: str, seen: set[tuple[int, int]], notes: _Notes) -> Iterator[Path]:
    """seen: folders not to enter (again), or links that go up or around would never end."""
    identity = _identity(folder)
    if identity in seen:
        return
    seen.add(identity)
    for entry in _entries(folder):
        if _is_folder(entry):
            yield from _images_below(entry.path, seen, notes)
        elif _is_image(entry):
            yield Path(entry.path)
        else:
            notes.no_images.append(Path(entry.path))


def _test_files(
    root: Path, tests: Sequence[str], wanted: set[str], where: str, notes: _Notes
) -> tuple[Path, list[tuple[Path, str]]]:
    """The first of the folders that holds images of a wanted class: test/ often holds images without a class."""
    refused = None
    for folder in part_folders(root, tests):
        own = _Notes()
        found = _annotated_files(folder) or class_files(folder, own)
        unknown = sorted({label for _, label in found} - wanted)
        if len(unknown) < len({label for _, label in found}):
            if unknown:
                raise UserError(_unknown_classes(root, folder, unknown, where))
            notes.no_images += own.no_images
            notes.no_class += own.no_class
            notes.empty += [name for name in own.empty if name not in wanted]
            return folder, found
        if unknown and refused is None:
            refused = _unknown_classes(root, folder, unknown, where)
    if refused is None:
        folder = next(iter(part_folders(root, tests)), None)
        state = "is not there" if folder is None else "holds no images in class folders"
        shown = printable(folder or root / tests[0])
        refused = f"{shown} {state}; {printable(root)} must hold test/<class>/<images> (or val/, valid/, ...)"
    raise UserError(refused)


def _unknown_classes(root: Path, folder: Path, unknown: list[str], where: str) -> str:
    return f"{printable(root)}: classes in {folder.name}/ {where}: {some(unknown)}"


def _annotated_files(folder: Path) -> list[tuple[Path, str]]:
    """Tiny ImageNet's test images (its val/): images/<name>, whose classes stand in a file. Empty where it isn't so."""
    notes = folder / "val_annotations.txt"
    if not notes.is_file() or not (folder / "images").is_dir():
        return []
    lines = notes.read_text("utf-8", "surrogateescape").splitlines()
    fields = [line.split("\t") for line in lines if line.strip()]
    listed = [(folder / "images" / field[0], class_name(field[1])) for field in fields if len(field) > 1]
    there = {entry.name for entry in _entries(folder / "images")}
    return listed if there else []


def _say_left_out(notes: _Notes, classes: set[str], tested: set[str]) -> None:
    for paths, reason in ((notes.no_images, "no images"), (notes.no_class, "in no class folder")):
        if paths:
            names = some([f"{path.parent.name}/{path.name}" for path in paths], 3)
            say(f"{len(paths)} {'files' if len(paths) > 1 else 'file'} left out, {reason}: {names}")
    if notes.empty:
        say(f"class folders left out, without images: {some(notes.empty)}")
    say_untested(classes, tested)


def say_untested(classes: set[str], tested: set[str]) -> None:
    """A line for the classes of which there are no test images."""
    if untested := sorted(classes - tested):
        say(f"no test images of {len(untested)} of {len(classes)} classes: {some(untested)}; tested without")


def some(names: Sequence[str | Path], n: int = 5) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - n:,} more" if len(names) > n else ""
    return ", ".join(printable(name) for name in names[:n]) + more


def class_name(folder: str) -> str:
    """A folder's name as its class: printable, and the same for both ways in which systems write an accent."""
    return unicodedata.normalize("NFC", printable(folder))


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """What the folder holds, sorted, without what is hidden or junk. Raises UserError where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not _is_junk(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read {printable(folder)}: {error.strerror}") from None


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in JUNK or name.endswith("_boxes.txt")


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot read {printable(folder)}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry) -> bool:
    """By its extension, else by what it holds. A link that leads nowhere is one that can't be read."""
    if not entry.is_file(follow_symlinks=False) and os.path.exists(entry.path) and not os.path.isfile(entry.path):
        return False  # a pipe, a socket
    if os.path.splitext(entry.name)[1].lower() in _formats().extensions:
        return True
    try:
        with Image.open(entry.path, formats=_formats().by_content):
            return True
    except Exception:  # Pillow's plugins raise anything
        return False


class _Formats(NamedTuple):
    """readable: what Pillow reads; by_content: those it knows by their first bytes; extensions: of the readable."""

    readable: list[str]
    by_content: list[str]
    extensions: set[str]


@functools.cache
def _formats() -> _Formats:
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")
    readable = [name for name in Image.ID if name != "EPS" and not _is_stub(Image.OPEN[name][0])]  # EPS is a program
    extensions = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    return _Formats(readable, [name for name in readable if Image.OPEN[name][1]], extensions)


def _is_stub(plugin: object) -> bool:
    """Formats that Pillow knows, but for which it needs another library."""
    return isinstance(plugin, type) and issubclass(plugin, ImageFile.StubImageFile)


# decoding


def read_image(path: Path | Row, size: int) -> Image.Image:
    """The image in RGB, upright, scaled (Lanczos) to cover size x size and cut to it around its centre.

    Of several frames the first. What is transparent is white. For values that are not of 8 bits see `_in_8_bits`.
    Raises UserError for one that can't be read, or not to its end.
    """
    try:
        if not isinstance(path, Row):
            files.ensure_regular(path)
        source = io.BytesIO(path.read()) if isinstance(path, Row) else path
        with Image.open(source, formats=_formats().readable) as image:
            image.load()
            rgb = _in_rgb(_in_8_bits(_upright(image)))
        return scaled(rgb, size)
    except Exception as error:  # Pillow's plugins raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = "not enough memory for it" if is_out_of_memory(error) else printable(reason.partition("\n")[0])
        reason = "no image that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else reason
        raise UserError(f"cannot read the image {printable(path)}: {reason}; mend or remove it") from None


def scaled(image: Image.Image, size: int) -> Image.Image:
    """Return the largest square around the image's centre, scaled to size x size (Lanczos).

    The result is that of ImageOps.fit in Pillow 13. Earlier versions always scale the rows first, so here each pass is
    a call of its own, and the pixels are the same with every version.
    """
    width, height = image.size
    if width == height == size:
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2

    def rows(image: Image.Image) -> Image.Image:
        return image.resize((size, image.height), Image.Resampling.LANCZOS, box=(left, 0, left + side, image.height))

    def columns(image: Image.Image) -> Image.Image:
        return image.resize((image.width, size), Image.Resampling.LANCZOS, box=(0, top, image.width, top + side))

    return rows(columns(image)) if columns_first(height, width, size) else columns(rows(image))


def columns_first(height: int, width: int, size: int) -> bool | torch.SymBool:
    """Whether Pillow 13 scales the columns before the rows. The sizes can be symbols, of a graph that is exported."""
    return height - size > torch.sym_max(0, 2 * (width - size))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; damaged EXIF says nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(0x0112))
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error):  # as its parser says it
        turn = None
    return image if turn is None else image.transpose(turn)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits, or floats, scaled to 0..255, as Pillow would cut them off at 255.

    Black is 0. White is the lowest of 1 (of floats alone), 255, 65535 and 2^31 - 1 (of integers alone) that none of the
    values exceeds; or their highest, where that would leave the image darker than a sixteenth of white (as with cameras
    of 10 and 12 bits). Floats from -1 to 1 are scaled as such. Raises ValueError for others below 0, and for NaN.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    lowest, highest = values.min(), values.max()
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    floats = image.mode == "F"
    if lowest < -max(highest, 0) / 16:  # less is what an interpolation leaves, and cut off
        if not floats or lowest < -1 or highest > 1:
            raise ValueError(f"what is black and white in values from {lowest:g} to {highest:g} can't be told")
        values, highest = (values + 1) / 2, 1.0
    white = next((w for w in ((1, 255, 65535) if floats else (255, 65535, 2**31 - 1)) if w >= highest), highest)
    if highest < white / 16:
        white = highest or 1
    return Image.fromarray((values.clip(0) * 255 / white + (0.5 if floats else 0)).astype(np.uint8))


def _in_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


class ImageFiles:
    """Images on the disk, decoded each time they are asked for: for sets that memory does not hold.

    shape: (N, size, size, 3), as if they were a tensor. digests: of each image, as `image_digests` gives them; where
    they are not given, all images are read when they are first asked for.
    """

    def __init__(self, paths: Sequence[str | bytes | Path | Row], size: int, digests: np.ndarray | None = None):
        self.paths = [path if isinstance(path, Row) else os.fsencode(path) for path in paths]
        self.shape = (len(paths), size, size, 3)
        self._digests = digests

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digests(self) -> np.ndarray:
        if self._digests is None:
            self._digests = np.concatenate([image_digests(images) for images in self.read(self.in_order())])
        return self._digests

    def subset(self, index: torch.Tensor) -> "ImageFiles":
        """Those with these indices (int64, on the CPU)."""
        digests = None if self._digests is None else self._digests[index.numpy()]
        return ImageFiles([self.paths[i] for i in index.tolist()], self.shape[1], digests)

    def in_order(self) -> Sequence[torch.Tensor]:
        """All indices, in parts to `read`."""
        return torch.arange(len(self)).split(250)

    def read(self, parts: Sequence[torch.Tensor], problems: list[UserError] | None = None) -> Iterator[torch.Tensor]:
        """The images of each part (indices), uint8 (B, H, W, 3), decoded ahead by threads (Pillow lets go of the lock).

        problems: where those of images that can't be read are gathered; without it UserError is raised for them.
        """
        for file in {path.file for path in self.paths if isinstance(path, Row)}:
            file.open()
        threads = _threads()
        pool = ThreadPoolExecutor(threads)
        ahead: deque[tuple[torch.Tensor, list[Future]]] = deque()
        try:
            for part in itertools.chain(parts, [None]):
                if part is not None:
                    ahead.append(self._start(pool, part))
                while ahead and (part is None or (len(ahead) > 2 and _in_work(ahead) > 4 * CHUNK * threads)):
                    images, started = ahead.popleft()
                    found = [problem for future in started for problem in future.result()]
                    if problems is None:
                        refuse_unreadable(found)
                    else:
                        problems += found
                    yield images
        finally:  # whoever was reading may have stopped, by Ctrl-C for one
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, part: torch.Tensor) -> tuple[torch.Tensor, list[Future]]:
        images = np.empty((len(part), *self.shape[1:]), np.uint8)
        paths = [self.paths[i] for i in part.tolist()]
        starts = range(0, len(paths), CHUNK)
        chunks = [(images[start : start + CHUNK], paths[start : start + CHUNK]) for start in starts]
        return torch.from_numpy(images), [pool.submit(_decode, *chunk) for chunk in chunks]


def _in_work(ahead: Sequence[tuple[torch.Tensor, list[Future]]]) -> int:
    return sum(len(images) for images, _ in ahead)


def _threads() -> int:
    return max(1, min(16, (os.cpu_count() or 1) // local_size()))


def _decode(images: np.ndarray, paths: Sequence[bytes | Row]) -> list[UserError]:
    """Decode the files into the array, uint8 (N, size, size, 3), and give the problems with those that can't be."""
    problems = []
    for index, path in enumerate(paths):
        try:
            source = path if isinstance(path, Row) else Path(os.fsdecode(path))
            images[index] = read_image(source, images.shape[1])
        except UserError as error:
            error.path = path
            problems.append(error)
    return problems


def refuse_unreadable(problems: list[UserError]) -> None:
    """Raises one UserError that names all images with these problems, if there are any."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        names = some([os.fsdecode(problem.path) for problem in problems])
        raise UserError(f"{len(problems):,} images can't be read: {names}; mend or remove them")


def image_digests(images: torch.Tensor | ImageFiles) -> np.ndarray:
    """A digest of each image's pixels, uint8 (N, 16)."""
    if isinstance(images, ImageFiles):
        return images.digests
    digests = [hashlib.sha256(image).digest()[:16] for image in images.numpy()]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


# keeping


def readable(found: Found, size: int) -> Found:
    """Those of the images that can be read; the others are said. To find them all are decoded once; they are kept.

    Raises UserError where a class has none left to train on, or none is left to test on.
    """
    kept, key = found.kept(f"unreadable_{size}.json"), fingerprint(found, size)
    everything = ImageFiles([path for own in found.files.values() for path, _ in own], size)
    unreadable = _read_unreadable(kept, key, len(everything))
    if unreadable is None:
        problems: list[UserError] = []
        for _ in everything.read(everything.in_order(), problems):
            pass
        paths = {problem.path for problem in problems}
        unreadable = [index for index, path in enumerate(everything.paths) if path in paths]
        try:
            files.write_json(files.sealed({"key": key, "unreadable": unreadable}), kept)
        except UserError as error:
            say(f"which images can't be read is not kept, the next start reads them all again ({error})")
    if not unreadable:
        return found
    rest = _without(found.files, set(unreadable))
    names = some([os.fsdecode(everything.paths[index]) for index in unreadable])
    say(f"{len(unreadable):,} of {len(everything):,} images left out, which can't be read: {names}")
    before, after = ({label for _, label in files["test"]} for files in (found.files, rest))
    if before != after:
        say_untested(before, after)
    return found._replace(files=rest)


def _read_unreadable(path: Path, key: str, n: int) -> list[int] | None:
    """The kept numbers of the images, of n, that can't be read; None where they are missing, damaged or of others."""
    try:
        files.ensure_regular(path)
        kept = files.unsealed(parsed.loads(path.read_bytes()))
        checks = {"key": lambda value: value == key, "unreadable": parsed.list_of(parsed.whole(0, n - 1), 0)}
        return None if parsed.flaw(kept, checks, checks) else kept["unreadable"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _without(listing: Files, left_out: set[int]) -> Files:
    """What is left of the images, which are numbered through all parts."""
    numbers, rest = itertools.count(), {}
    for part, own in listing.items():
        rest[part] = [image for image in own if next(numbers) not in left_out]
        lost = sorted({label for _, label in own} - {label for _, label in rest[part]})
        if lost and (part == "train" or not rest[part]):
            raise UserError(f"no image of {part} can be read of {some(lost)}; mend some, or remove the class")
    return rest


def decoded(found: Found, size: int) -> dict[str, np.ndarray]:
    """The images of each part, uint8 (N, size, size, 3): decoded, or as kept at root where nothing changed since.

    Raises UserError that names all images that can't be read.
    """
    cache, key = found.kept(f"decoded_{size}.npz"), fingerprint(found, size)
    images = _read_cache(cache, key, {part: (len(own), size, size, 3) for part, own in found.files.items()})
    if images is None:
        images = _decode_all(found.files, size)
        _write_cache(cache, key, images)
    return images


def _decode_all(listing: Files, size: int) -> dict[str, np.ndarray]:
    everything = ImageFiles([path for found in listing.values() for path, _ in found], size)
    images, problems, start = np.empty(everything.shape, np.uint8), [], 0
    for part in everything.read(everything.in_order(), problems):
        images[start : start + len(part)] = part.numpy()
        start += len(part)
    refuse_unreadable(problems)
    ends = itertools.accumulate(len(found) for found in listing.values())
    return {part: images[end - len(listing[part]) : end] for part, end in zip(listing, ends, strict=True)}


def fingerprint(found: Found, size: int) -> str:
    """What changes when an image is added, removed, renamed or written anew, or is to have another size."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size}\n".encode())
    for part, own in found.files.items():
        for path, label in own:
            name = os.fsencode(os.path.relpath(path, found.root))
            digest.update(b"%s\0%s\0%s\0%d %d %d %d\n" % (part.encode(), label.encode(), name, *_stamp(path)))
    return digest.hexdigest()


def _stamp(path: Path | Row) -> files.Stamp:
    try:
        return path.file.stamp if isinstance(path, Row) else files.Stamp.of(path)
    except OSError:  # it will be named with the others that can't be read
        return files.Stamp(0, 0, 0, 0)


def _read_cache(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
    """The decoded images in the cache, of these shapes, or None where it is missing, damaged or of other images."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zipfile checks each array's CRC-32
            if str(arrays["key"]) != key:
                return None
            images = {part: arrays[part] for part in shapes}
        if any(own.dtype != np.uint8 or own.shape != shapes[part] for part, own in images.items()):
            raise ValueError("arrays of another form")
        return images
    except FileNotFoundError:
        return None
    except Exception:  # zipfile and NumPy raise whatever the bytes lead them to
        say(f"{printable(path)} is damaged: the images are decoded anew")
        return None


def _write_cache(path: Path, key: str, images: dict[str, np.ndarray]) -> None:
    """Keep the decoded images; a folder that can't be written costs time at the next start, no more."""
    try:
        with files.replacing(path) as file:
            np.savez(file, key=np.array(key), **images)
    except UserError as error:
        say(f"the decoded images are not kept, the next start decodes them again ({error})")
