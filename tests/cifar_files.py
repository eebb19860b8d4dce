"""Small copies of CIFAR-10 and CIFAR-100, in every form that people have them in."""

import hashlib
import pickle
import tarfile

import numpy as np
from PIL import Image

from util import cifar
from util.cifar import KINDS

BARE = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}


def make_small(monkeypatch, name, train=2, test=1):
    """Have a whole copy be one of so few images of each class; give its pixels and labels, in no order."""
    kind, rng = KINDS[name], np.random.default_rng(7)
    parts = []
    for n in (train, test):
        labels = rng.permutation(np.repeat(np.arange(kind.classes), n))
        pixels = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8) // 4 + labels[:, None, None, None] // 2
        parts.append((pixels.astype(np.uint8), labels))
    digests = tuple(digest(*part) for part in parts) if kind.digests else None
    counts = tuple(len(labels) for _, labels in parts)
    monkeypatch.setitem(cifar.KINDS, name, kind._replace(counts=counts, digests=digests))
    return parts


def digest(pixels, labels):
    each = [
        hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in zip(pixels, labels, strict=True)
    ]
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()


def class_names(name):
    return [f"class{k:03}" for k in range(KINDS[name].classes)]


def write_bare(folder, name, parts, protocol=2):
    """The files of the official archive, in its format: planes of red, green and blue, keys of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name]
    for names, (pixels, labels) in zip((kind.train, kind.test), parts, strict=True):
        pieces = np.array_split(np.arange(len(labels)), len(names))
        for file, piece in zip(names, pieces, strict=True):
            planes = pixels[piece].transpose(0, 3, 1, 2).reshape(-1, 3072)
            content = {b"data": planes, kind.labels.encode(): labels[piece].tolist()}
            (folder / file).write_bytes(pickle.dumps(content, protocol=protocol))
    (folder / kind.meta).write_bytes(pickle.dumps({kind.names: class_names(name)}))
    return folder


def write_archive(root, name, parts):
    folder = write_bare(root / "made" / BARE[name], name, parts)
    with tarfile.open(root / KINDS[name].source.filename, "w:gz") as archive:
        archive.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.parent.rmdir()


def write_folders(root, name, parts):
    """PNGs in folders of classes."""
    names = class_names(name)
    for part, (pixels, labels) in zip(("train", "test"), parts, strict=True):
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / part / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")


COPIES = {
    "official folder": lambda root, name, parts: write_bare(root / BARE[name], name, parts),
    "archive": write_archive,
    "bare": write_bare,
    "bare, one level down": lambda root, name, parts: write_bare(root / "kaggle", name, parts, protocol=4),
    "png": write_folders,
    "png, one level down": lambda root, name, parts: write_folders(root / "CIFAR", name, parts),
}
