"""Small files in the formats in which CIFAR-10 and CIFAR-100 go about, and what a set of that size is known by."""

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images import cifar

LAYOUTS = ("folder", "bare", "below", "archive", "png", "png_below", "parquet")


def write_cifar100(root: Path, n_train: int = 200, n_test: int = 100, layout: str = "folder", order: int = 0):
    """Write train, test and meta as the official ones are, or a PNG for each image. layout: one of LAYOUTS.

    order: a seed for the images' order; their content is always the same. Returns the cifar.Cifar of these files, for
    monkeypatch.setitem(cifar.KINDS, "cifar100", ...).
    """
    return _write("cifar100", root, n_train, n_test, layout, order)


def write_cifar10(root: Path, n_train: int = 50, n_test: int = 20, layout: str = "folder", order: int = 0):
    """The same of CIFAR-10, whose training images are in five files."""
    return _write("cifar10", root, n_train, n_test, layout, order)


def _write(name: str, root: Path, n_train: int, n_test: int, layout: str, order: int) -> cifar.Cifar:
    kind, rng = cifar.KINDS[name], np.random.default_rng(3)
    digests, contents, md5s = {}, {}, {}
    for part, n in (("train", n_train), ("test", n_test)):
        labels = np.arange(n) % len(kind.classes)
        images = (rng.integers(0, 128, (n, 32, 32, 3)) + labels[:, None, None, None]).astype(np.uint8)
        digests[part] = cifar.content_digest(cifar._digests(images, labels))
        shuffled = np.random.default_rng(order).permutation(n)
        images, labels = images[shuffled], labels[shuffled]
        if layout == "parquet":
            _write_parquet(root / "cifar100" / f"{part}-00000-of-00001.parquet", kind, images, labels)
        if layout.startswith("png"):
            _write_images(root / "copy" / part if layout == "png_below" else root / part, kind, images, labels)
        files = kind.files[part]
        for file, index in zip(files, np.array_split(np.arange(n), len(files)), strict=True):
            contents[file] = _pickled(kind, images[index], labels[index])
            md5s[file] = hashlib.md5(contents[file]).hexdigest()
    file, key = kind.names
    contents[file] = pickle.dumps({key.encode(): [label.encode() for label in kind.classes]}, protocol=2)
    if layout != "parquet" and not layout.startswith("png"):
        folder = {"bare": root, "below": root / "copy"}.get(layout, root / kind.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
    if layout == "archive":
        with tarfile.open(root / kind.archive, "w:gz") as tar:
            tar.add(folder, kind.folder)
        for file in contents:
            (folder / file).unlink()
        folder.rmdir()
    known = {"digests": digests} if kind.digests else {"md5s": md5s}
    return dataclasses.replace(kind, counts={"train": n_train, "test": n_test}, **known)


def _pickled(kind: cifar.Cifar, images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
    names = [f"image_{k:06}.png".encode() for k in range(len(images))]
    content = {b"data": planes, kind.labels.encode(): labels.tolist(), b"filenames": names, b"batch_label": b"a part"}
    return pickle.dumps(content, protocol=2)


def _write_images(part: Path, kind: cifar.Cifar, images: np.ndarray, labels: np.ndarray) -> None:
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = part / kind.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:06}.png")


def _write_parquet(path: Path, kind: cifar.Cifar, images: np.ndarray, labels: np.ndarray) -> None:
    """As the hub has them: PNGs in a column img, the number of the class in fine_label."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [io.BytesIO() for _ in images]
    for image, content in zip(images, contents, strict=True):
        Image.fromarray(image).save(content, "PNG")
    table = pa.table({"img": [{"bytes": c.getvalue(), "path": None} for c in contents], "fine_label": labels})
    features = {"img": {"_type": "Image"}, "fine_label": {"_type": "ClassLabel", "names": list(kind.classes)}}
    about = json.dumps({"info": {"features": features}}).encode()
    pq.write_table(table.replace_schema_metadata({b"huggingface": about}), path)
