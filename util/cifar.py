"""CIFAR-10 and CIFAR-100 from any copy of them, recognised by its content and brought into one order.

A copy may be the official archive or folder, its bare files, or a folder of images for each class. The order of the
images differs between copies; here they are in the order of their SHA-256, which no copy's container changes.
"""

import contextlib
import hashlib
import io
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets

from util import images
from util.runtime import UserError, say


class Kind(NamedTuple):
    """What a whole copy is.

    train, test, meta: the names of its files, of pickles. labels, names: what these call the labels, and the classes'
    names. counts: of training and test images. digests: of their content, where they are known: the SHA-256 of the
    sorted SHA-256s of each image, its label as one byte before its 3,072 bytes, row by row, red, green and blue.
    """

    title: str
    source: type[datasets.CIFAR10]
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str
    counts: tuple[int, int]
    digests: tuple[str, str] | None


class Part(NamedTuple):
    """images: uint8 (N, 32, 32, 3), contiguous; labels: int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


KINDS = {
    "cifar100": Kind(
        "CIFAR-100", datasets.CIFAR100, 100, ("train",), ("test",), "meta", "fine_labels", "fine_label_names",
        (50_000, 10_000),
        (
            "36ce7a701fbea47796e570c34382aad50f2539687cfcbc6ae96e2f56530d29b6",
            "d3cd5d87a1b9317a0982c8ef5535fe3b86da8da90b13ce5e9b23ea06400dd5eb",
        ),
    ),
    "cifar10": Kind(
        "CIFAR-10", datasets.CIFAR10, 10, tuple(f"data_batch_{k}" for k in range(1, 6)), ("test_batch",),
        "batches.meta", "labels", "label_names", (50_000, 10_000), None,
    ),
}  # fmt: skip


def load(name: str, data_dir: Path) -> tuple[Part, Part, tuple[str, ...]]:
    """Training images, test images and the names of the classes, from what lies in data_dir, or is downloaded there.

    Raises UserError for a copy that is not whole or differs, and where there is none and none can be had.
    """
    kind = KINDS[name]
    found = _found(kind, data_dir)
    if found is None:
        _download(kind, name, data_dir)
        found = _found(kind, data_dir)
    where, train, test, classes = found
    return *_recognised(kind, where, train, test, classes), classes


def _found(kind: Kind, data_dir: Path) -> tuple[Path, Part, Part, tuple[str, ...]] | None:
    """What lies there, as it is, and where; None where nothing of the kind does."""
    bare = [path for root in images.roots(data_dir) for path in (root / kind.source.base_folder, root)]
    for folder in bare:
        if any((folder / name).is_file() for name in (*kind.train, *kind.test)):
            return folder, *_unpickled(kind, folder, lambda name, folder=folder: (folder / name).read_bytes())
    for archive in (root / kind.source.filename for root in images.roots(data_dir)):
        if archive.is_file():
            return archive, *_unpickled(kind, archive, _members(kind, archive).__getitem__)
    with contextlib.suppress(UserError):
        listed = images.find(data_dir)
        return listed.root, *_decoded(listed)
    return None


def _members(kind: Kind, archive: Path) -> dict[str, bytes]:
    """The archive's files of this kind, by name; nothing is unpacked on the disk."""
    wanted = {*kind.train, *kind.test, kind.meta}
    try:
        with tarfile.open(archive) as opened:
            inside = [member for member in opened if member.isfile() and Path(member.name).name in wanted]
            return {Path(member.name).name: opened.extractfile(member).read() for member in inside}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it, to have it downloaded anew") from None


class _Plain(pickle.Unpickler):
    """Reads numpy arrays and plain types alone: a file runs no code."""

    ALLOWED = {
        "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
        "_codecs encode",
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickled(kind: Kind, where: Path, read: Callable[[str], bytes]) -> tuple[Part, Part, tuple[str, ...]]:
    folder = kind.source.base_folder
    official = dict([*kind.source.train_list, *kind.source.test_list])
    strange = False
    contents = {}
    for name in (*kind.train, *kind.test, kind.meta):
        try:
            content = read(name)
        except (OSError, KeyError):
            raise UserError(
                f"{where} is not the whole of {kind.title}: it lacks {name}; {', '.join(kind.train)}, "
                f"{', '.join(kind.test)} and {kind.meta} belong there, or into {folder}/"
            ) from None
        strange |= name in official and hashlib.md5(content).hexdigest() != official[name]
        try:
            value = _Plain(io.BytesIO(content), encoding="latin1").load()
            contents[name] = {_text(key): part for key, part in value.items()}
        except Exception as error:  # unpickling raises whatever the bytes lead it to
            raise UserError(
                f"{where / name} is no file of {kind.title}, or damaged ({error}); {', '.join(kind.train)}, "
                f"{', '.join(kind.test)} and {kind.meta} belong there, or into {folder}/"
            ) from None
    try:
        train, test = (_joined([contents[name] for name in names], kind.labels) for names in (kind.train, kind.test))
        classes = tuple(_text(name) for name in contents[kind.meta][kind.names])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not in the format of {kind.title} ({error})") from None
    if kind.digests is None and strange:
        say(f"{where}: not the official files of {kind.title}; whether all images are there is all that is known")
    return train, test, classes


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _joined(contents: list[dict[str, Any]], labels: str) -> Part:
    pixels = np.concatenate([content["data"] for content in contents])
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise ValueError(f"data of {pixels.dtype}, {pixels.shape}")
    # Planes of red, green and blue, and torchvision's view of them is no contiguous one.
    pixels = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Part(pixels, np.concatenate([np.asarray(content[labels], dtype=np.int64) for content in contents]))


def _decoded(listed: images.Found) -> tuple[Part, Part, tuple[str, ...]]:
    classes = tuple(sorted({label for _, label in listed.train}))
    number = {label: index for index, label in enumerate(classes)}
    pixels = images.decoded(listed, 32, images.key_of(listed, 32))
    parts = {"train": listed.train, "test": listed.test}
    train, test = (
        Part(pixels[name], np.array([number[label] for _, label in part], dtype=np.int64))
        for name, part in parts.items()
    )
    return train, test, classes


def _recognised(kind: Kind, where: Path, train: Part, test: Part, classes: tuple[str, ...]) -> Iterator[Part]:
    """The parts in their own order. Raises UserError, which says what is missing or different."""
    for number, (name, part) in enumerate((("training", train), ("test", test))):
        counts = np.bincount(part.labels, minlength=kind.classes)
        each = kind.counts[number] // kind.classes
        if len(classes) != kind.classes or len(counts) > kind.classes or len(part.images) != len(part.labels):
            raise UserError(
                f"{where} is not {kind.title}: it has {len(classes)} classes, not {kind.classes}; "
                "--dataset folder takes any images in folders"
            )
        if (counts != each).any():
            odd = [f"{classes[k]} has {counts[k]}" for k in np.flatnonzero(counts != each)]
            raise UserError(
                f"{where} is not the whole of {kind.title}: {len(part.labels):,} of {kind.counts[number]:,} {name} "
                f"images, {each} of each class ({images.some(odd)}); get another copy, or use --dataset folder"
            )
        labelled = np.concatenate([part.labels.astype(np.uint8)[:, None], part.images.reshape(-1, 3072)], axis=1)
        digests = [hashlib.sha256(row).digest() for row in labelled]
        if kind.digests and hashlib.sha256(b"".join(sorted(digests))).hexdigest() != kind.digests[number]:
            raise UserError(
                f"{where} has as many images as {kind.title}, but other pixels or labels among its {name} images "
                "(scaled, or stored with loss?); get another copy, or use --dataset folder"
            )
        order = sorted(range(len(digests)), key=digests.__getitem__)
        yield Part(part.images[order], part.labels[order])


def _download(kind: Kind, name: str, data_dir: Path) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision's remarks are no figures
            kind.source(data_dir, download=True)
    except (OSError, RuntimeError) as error:  # no network; what came is damaged
        raise UserError(
            f"{name} can't be downloaded ({error}); put {kind.source.filename} (from {kind.source.url}) into "
            f"{data_dir}, or use --dataset digits or --dataset folder, which need no network"
        ) from None
