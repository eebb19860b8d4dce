"""Image files: found, listed, decoded, and kept decoded beside them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps

from util import files
from util.processes import local_size
from util.runtime import UserError, say

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}
CACHE_FORMAT = 2


class ImageFiles(torch.utils.data.Dataset):
    """Images on the disk, decoded each time they are asked for: for sets that memory does not hold.

    key: differs where the files do.
    """

    def __init__(self, paths: list[Path], size: int, key: str):
        # One array: a list of a million paths would be copied into each worker as its reference counts change.
        self.paths, self.key = np.array([os.fsencode(path) for path in paths]), key
        self.shape = (len(paths), size, size, 3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(read_image(Path(os.fsdecode(self.paths[index])), self.shape[1])))

    def read(self, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images of each part (indices), uint8 (B, H, W, 3), decoded by worker processes.

        Raises UserError for an image that can't be read.
        """
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=[part.tolist() for part in parts],
            num_workers=max(1, min(16, (os.cpu_count() or 1) // local_size())),
            generator=torch.Generator(),  # it draws a seed for the workers, not from the run's own generator
        )
        try:
            yield from loader
        except UserError as error:  # a worker's traceback and, at its end, what it raised
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None


Files = dict[str, list[tuple[Path, str]]]  # for "train" and "test": each image and its class


def folder_files(root: Path) -> Files:
    """The images of train/<class>/* and test/<class>/*; class folders may be links."""
    listing = {part: _class_files(root / part, root) for part in ("train", "test")}
    only = {part: {name for _, name in found} for part, found in listing.items()}
    for part, other in (("train", "test"), ("test", "train")):
        if extra := sorted(only[part] - only[other]):
            names = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UserError(f"{root}: classes in {part}/ that are not in {other}/: {names}; both need the same")
    return listing


def _class_files(part: Path, root: Path) -> list[tuple[Path, str]]:
    if not part.is_dir():
        raise UserError(f"{part} is not there; {root} must hold train/<class>/<images> and test/<class>/<images>")
    classes = sorted(entry for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [(path, folder.name) for folder in classes for path in _images_in(folder)]
    if not files:
        raise UserError(f"{part} holds no images; it must hold a folder of images for each class")
    return files


def _images_in(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise UserError(f"{folder} holds no images ({' '.join(sorted(SUFFIXES))})")
    return paths


def tiny_imagenet_root(data_dir: Path) -> Path:
    for root in (data_dir / "tiny-imagenet-200", data_dir):
        if (root / "val" / "val_annotations.txt").is_file():
            return root
    raise UserError(f"{data_dir} holds no tiny-imagenet-200 folder; unpack tiny-imagenet-200.zip there")


def tiny_imagenet_files(root: Path) -> Files:
    """The standard layout; its labelled validation images are the test images."""
    train = [
        (path, folder.name)
        for folder in sorted((root / "train").glob("*"))
        if folder.is_dir()
        for path in _images_in(folder / "images")
    ]
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    fields = [line.split("\t") for line in lines if line.strip()]
    test = [(root / "val" / "images" / field[0], field[1]) for field in fields if len(field) > 1]
    if not train or not test:
        raise UserError(f"{root}: train/ or val/ holds no images; unpack tiny-imagenet-200.zip again")
    if unknown := {name for _, name in test} - {name for _, name in train}:
        raise UserError(f"{root}: val_annotations.txt names {min(unknown)}, which is no class of train/")
    return {"train": train, "test": test}


def decoded(root: Path, listing: Files, size: int, key: str) -> dict[str, np.ndarray]:
    """Decode the images, or take them from the cache beside them where nothing changed since."""
    cache = root / f".decoded_{size}.npz"
    images = _read_cache(cache, key)
    if images is None:
        images = {part: _decode([path for path, _ in found], size) for part, found in listing.items()}
        _write_cache(cache, key, images)
    return images


def fingerprint(root: Path, listing: Files, size: int) -> str:
    """What changes when an image is added, removed, renamed or written anew, or is to have another size."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {size}\n".encode())
    for part, found in listing.items():
        for path, label in found:
            status = _status(path)
            digest.update(f"{part}\0{label}\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _decode(paths: list[Path], size: int) -> np.ndarray:
    """uint8 (N, size, size, 3), decoded by as many threads as there are cores (Pillow lets go of the lock)."""
    images = np.empty((len(paths), size, size, 3), np.uint8)

    def decode(index: int) -> None:
        images[index] = read_image(paths[index], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return images


def read_image(path: Path, size: int) -> Image.Image:
    """The image in RGB, upright, scaled (Lanczos) to cover size x size and cut to it around its centre."""
    try:
        with Image.open(path) as image:
            rgb = ImageOps.exif_transpose(_in_8_bits(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}; mend or remove it") from None
    return rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Pillow cuts grey values of 16 bits off at 255 where it is not told to scale them."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))


def _read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The decoded images in the cache, or None where it is missing, damaged or of other images."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            return {part: arrays[part] for part in ("train", "test")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _write_cache(path: Path, key: str, images: dict[str, np.ndarray]) -> None:
    """Keep the decoded images; a folder that can't be written costs time at the next start, no more."""
    try:
        with files.replacing(path) as file:
            np.savez(file, key=np.array(key), **images)
    except UserError as error:
        say(f"the decoded images are not kept, the next start decodes them again ({error})")
