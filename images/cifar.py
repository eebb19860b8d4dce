"""CIFAR-10 and CIFAR-100 from any copy: the official files, in an archive or not, an image file for each image, or the
Hugging Face hub's parquet files.

A copy is known by what it holds, not by its container or the order of its images; all give the same arrays.
"""

import hashlib
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from images.folders import TEST, TRAIN, Found, class_files, decoded, folders, part_folders, roots
from images.listed import find_parquet
from util.runtime import UserError, say
from util.text import printable


@dataclass(frozen=True)
class Cifar:
    """What one of the two is.

    files: those of each part. labels, names: the keys of its labels and, in the file of names, of the classes' names.
    counts: how many images each part has, as many of each class. digests: `content_digest` of each part, where that is
    known; else md5s are those of the official files.
    """

    title: str
    folder: str
    archive: str
    url: str
    files: dict[str, tuple[str, ...]]
    labels: str
    names: tuple[str, str]
    classes: tuple[str, ...]
    counts: dict[str, int]
    digests: dict[str, str] | None = None
    md5s: dict[str, str] | None = None


FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""  # CIFAR-100's classes

KINDS = {
    "cifar100": Cifar(
        "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        {"train": ("train",), "test": ("test",)}, "fine_labels", ("meta", "fine_label_names"),
        tuple(FINE.split()),
        {"train": 50_000, "test": 10_000},
        digests={
            "train": "36ce7a701fbea47796e570c34382aad50f2539687cfcbc6ae96e2f56530d29b6",
            "test": "d3cd5d87a1b9317a0982c8ef5535fe3b86da8da90b13ce5e9b23ea06400dd5eb",
        },
    ),
    "cifar10": Cifar(
        "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
        "labels", ("batches.meta", "label_names"),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        {"train": 50_000, "test": 10_000},
        md5s={
            "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
}  # fmt: skip


class Part(NamedTuple):
    """images: uint8 (N, 32, 32, 3), contiguous; labels: int64 (N,); official: whether it is so by the files' md5.

    places: of each image, in the order of the official files, its index here; None for a copy in another form.
    """

    images: np.ndarray
    labels: np.ndarray
    official: bool = False
    places: np.ndarray | None = None


class Damaged(Exception):
    """A file that is none of this data set's; says why."""


Files = dict[str, bytes]  # the contents of some of the official files


def read(kind: Cifar, data_dir: Path) -> dict[str, Part] | None:
    """Both parts, each in a fixed order of its own, from the first whole copy in data_dir; None where there is none.

    Looked for in data_dir, in its folders, and in the archive. Raises UserError where no copy is whole and right.
    """
    problem = None
    for place, parts in _copies(kind, data_dir):
        try:
            return _checked(kind, place, parts())
        except UserError as error:
            problem = problem or error
    if problem:
        raise problem
    return None


def _copies(kind: Cifar, data_dir: Path) -> Iterator[tuple[Path, Callable[[], dict[str, Part]]]]:
    """Where something of the kind lies, and what reads it."""
    places = [data_dir / kind.folder, data_dir, *(path for path in folders(data_dir) if path.name != kind.folder)]
    wanted = {*sum(kind.files.values(), ()), kind.names[0]}
    for folder in places:
        there = [name for name in sorted(wanted) if os.path.isfile(folder / name)]
        if any(name != kind.names[0] for name in there):
            yield folder, lambda folder=folder, there=there: _unpickled(kind, folder, _file_contents(folder, there))
    for archive in (folder / kind.archive for folder in places):
        if os.path.isfile(archive) and (contents := _archive_contents(archive, wanted)):
            yield archive, lambda archive=archive, contents=contents: _unpickled(kind, archive, contents)
    for root in roots(data_dir):
        if _has_class_folders(kind, root):
            yield root, lambda root=root: _from_images(kind, root)
    for root in (data_dir, *folders(data_dir)):
        if found := _parquet(kind, root):
            yield root, lambda found=found: _decoded(kind, found)


# the official files


def _file_contents(folder: Path, names: list[str]) -> Files:
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise UserError(f"cannot read {printable(error.filename)}: {error.strerror}") from None


def _archive_contents(archive: Path, names: set[str]) -> Files:
    """The files of these names in the archive; none where it is cut or damaged, for it can be fetched again."""
    try:
        with tarfile.open(archive) as tar:
            members = {PurePosixPath(member.name).name: member for member in tar if member.isfile()}
            return {name: tar.extractfile(members[name]).read() for name in names if name in members}
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        return {}


def _unpickled(kind: Cifar, place: Path, contents: Files) -> dict[str, Part]:
    everything = [*sum(kind.files.values(), ()), kind.names[0]]
    listed = f"{', '.join(everything[:-1])} and {everything[-1]}"
    try:
        for name in everything[:-1]:
            if name not in contents:
                raise Damaged(f"there is no {name}")
        if kind.digests is None:  # else a wrong order of the classes shows in them
            _check_names(kind, contents)
        return {part: _part(kind, {name: contents[name] for name in names}) for part, names in kind.files.items()}
    except Damaged as problem:
        raise UserError(
            f"{printable(place)} is incomplete or damaged: {problem}; it must hold {kind.title}'s own {listed}, "
            f"as in {kind.archive} (from {kind.url}); mend or remove it"
        ) from None


def _check_names(kind: Cifar, contents: Files) -> None:
    file, key = kind.names
    if file in contents:
        names = _plain(_unpickle(file, contents[file]).get(key))
        if names != list(kind.classes):
            raise Damaged(f"{file} names other classes, or in another order")


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _part(kind: Cifar, contents: Files) -> Part:
    images, labels = zip(*(_arrays(kind, name, content) for name, content in contents.items()), strict=True)
    md5s = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in contents.items()}
    official = kind.md5s is not None and all(kind.md5s.get(name) == md5 for name, md5 in md5s.items())
    labels = np.concatenate(labels)
    return Part(np.concatenate(images), labels, official, np.arange(len(labels)))


def _arrays(kind: Cifar, name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 32, 32, 3) and labels of one file, whose images are planes of red, green and blue."""
    values = _unpickle(name, content)
    data, labels = values.get("data"), values.get(kind.labels)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.size % 3072 or not data.size:
        raise Damaged(f"{name} holds no images of 32x32 pixels")
    try:
        labels = np.array(labels)
        right = labels.shape == (data.size // 3072,) and labels.dtype.kind in "iu"
    except ValueError:
        right = False
    if not right or labels.min() < 0 or labels.max() >= len(kind.classes):
        raise Damaged(f"{name} holds no {kind.labels} from 0 to {len(kind.classes) - 1}, one for each image")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


class _Unpickler(pickle.Unpickler):
    """Makes numpy's arrays and plain types, nothing else: a pickle can name any function to be called."""

    def find_class(self, module: str, name: str) -> object:
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        owner, _, part = module.rpartition(".")
        if owner in ("numpy.core", "numpy._core") and (part, name) in (
            ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"),
        ):  # fmt: skip
            return _numpys(part, name)
        raise Damaged(f"it wants to call {module}.{name}")


def _numpys(part: str, name: str) -> object:
    """numpy's own function to make an array, under the name that this numpy has for it."""
    core = np._core if hasattr(np, "_core") else np.core
    return getattr(getattr(core, part), name)


def _unpickle(name: str, content: bytes) -> dict[str, object]:
    """The dictionary in the file, its keys as str. latin1: Python 2 wrote bytes and arrays' memory as its str."""
    try:
        values = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Damaged as problem:
        raise Damaged(f"{name}: {problem}") from None
    except Exception:  # a damaged pickle fails in any way
        raise Damaged(f"{name} is no pickle of arrays") from None
    if not isinstance(values, dict):
        raise Damaged(f"{name} holds no dictionary")
    return {_plain(key): value for key, value in values.items()}


# image files


def _normal(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_")


def _has_class_folders(kind: Cifar, root: Path) -> bool:
    """Whether half of the classes have folders in train/: other data sets lie in the same folder, too."""
    for train in part_folders(root, TRAIN):
        names = {_normal(path.name) for path in folders(train)}
        return 2 * len(names & set(kind.classes)) >= len(kind.classes)
    return False


def _from_images(kind: Cifar, root: Path) -> dict[str, Part]:
    listing = {}
    for part, names in (("train", TRAIN), ("test", TEST)):
        folder = next(iter(part_folders(root, names)), None)
        found = class_files(folder) if folder else []
        listing[part] = [(path, _normal(label)) for path, label in found]
        if other := {label for _, label in listing[part]} - set(kind.classes):
            raise UserError(f"{printable(folder)} has a folder {min(other)}, which is no class of {kind.title}")
    return _decoded(kind, Found(root, listing))


def _decoded(kind: Cifar, found: Found) -> dict[str, Part]:
    number = {name: index for index, name in enumerate(kind.classes)}
    labels = {part: np.array([number[label] for _, label in own], np.int64) for part, own in found.files.items()}
    _check_counts(kind, found.root, labels)  # before many thousands of files are decoded
    images = decoded(found, 32)
    return {part: Part(images[part], labels[part]) for part in found.files}


def _parquet(kind: Cifar, root: Path) -> Found | None:
    """The images in parquet files, as the Hugging Face hub has them; None where they are not of these classes."""
    if not any(root.glob("*.parquet")) and not any(root.glob("data/*.parquet")):
        return None
    try:
        found = find_parquet(root)
    except UserError as error:
        say(f"passed over: {error}")
        return None
    if {_normal(name) for name in found.classes} != {*kind.classes}:
        return None
    return found._replace(
        files={part: [(row, _normal(label)) for row, label in own] for part, own in found.files.items()}
    )


# recognising


def _checked(kind: Cifar, place: Path, parts: dict[str, Part]) -> dict[str, Part]:
    """The parts in their fixed order, that of their images' digests."""
    _check_counts(kind, place, {part: content.labels for part, content in parts.items()})
    digests = {part: _digests(*content[:2]) for part, content in parts.items()}
    if kind.digests:
        wrong = [part for part, own in digests.items() if content_digest(own) != kind.digests[part]]
        if wrong:
            raise UserError(
                f"{printable(place)}: as many images as {kind.title}, but in {' and '.join(wrong)} pixels or labels "
                f"differ from its own; put {kind.archive} (from {kind.url}) there, or use --dataset folder"
            )
    elif not all(content.official for content in parts.values()):
        say(f"{printable(place)} is taken for {kind.title} by counts and classes; the files are not the official ones")
    return {part: _in_order(content, digests[part]) for part, content in parts.items()}


def _in_order(content: Part, digests: list[bytes]) -> Part:
    order = sorted(range(len(digests)), key=digests.__getitem__)
    places = None if content.places is None else np.argsort(order)
    return Part(np.ascontiguousarray(content.images[order]), content.labels[order], content.official, places)


def _digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """SHA-256 of each image's label, as one byte, and its pixels, row by row."""
    rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
    return [hashlib.sha256(row).digest() for row in rows]


def content_digest(digests: list[bytes]) -> str:
    """A digest of a part that does not depend on the order of its images: SHA-256 over theirs, sorted."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _check_counts(kind: Cifar, place: Path, labels: dict[str, np.ndarray]) -> None:
    classes, told = len(kind.classes), []
    for part, numbers in labels.items():
        total = kind.counts[part]
        wanted = np.array([total // classes + (index < total % classes) for index in range(classes)])
        counts = np.bincount(numbers, minlength=classes)
        wrong = np.flatnonzero(counts != wanted)
        if len(wrong):
            some = ", ".join(f"{kind.classes[i]} {counts[i]} of {wanted[i]}" for i in wrong[:3])
            more = f" and {len(wrong) - 3} more classes" if len(wrong) > 3 else ""
            told.append(f"{part} has {len(numbers):,} of {total:,} images ({some}{more})")
    if told:
        raise UserError(
            f"{printable(place)}: {kind.title}, but not whole: {'; '.join(told)}; "
            f"put {kind.archive} (from {kind.url}) there, or use --dataset folder"
        )
