"""Data sets as tensors on the device, batches of them, augmentation.

The digits (digits.npz) are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0: 1,797 images of 8x8 pixels, their
values 0..16 stretched to 0..255. The split is fixed and stratified: of each class, shuffled, the first 297/1797 are for
testing.
"""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets

from util import files
from util.images import Files, ImageFiles, decoded, fingerprint, folder_files, tiny_imagenet_files, tiny_imagenet_root
from util.images import read_image as _read_image  # noqa: F401
from util.processes import Processes
from util.runtime import UserError, free_memory, say

DATASETS = ("cifar100", "cifar10", "tiny_imagenet", "folder", "digits")
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DIGITS = Path(__file__).with_name("digits.npz")
PADDING = 4  # of the random crop, in pixels
OFFSETS = 2 * PADDING + 1  # of the crop's window, down and across
VIEWS = OFFSETS * OFFSETS * 2  # and flipped or not

Statistics = tuple[float, float, float]  # one value for each of red, green and blue


class Split(NamedTuple):
    """images: uint8 (N, H, W, 3), contiguous, or the files they are decoded from; labels: int64 (N,)."""

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, with the statistics of its training images' channels, pixels taken as 0 to 1."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: Statistics
    std: Statistics

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where an image or a label does; of streamed images, where a file does."""
        return _digest(self.train, self.test)

    @functools.cached_property
    def test_fingerprint(self) -> str:
        """`fingerprint` of the test images alone: results that share it were tested on the same images, in order."""
        return _digest(self.test)

    @property
    def image_size(self) -> int:
        """The side of the images, which are square."""
        return self.train.images.shape[1]


def _digest(*parts: Split) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.images.numpy() if isinstance(part.images, torch.Tensor) else part.images.key.encode())
        digest.update(part.labels.numpy())
    return digest.hexdigest()[:32]


class Batch(NamedTuple):
    """index: int64 (B,), which images of the split; images: float32 (B, 3, H, W), channels last; labels: int64 (B,).

    host_index: the index once more, on the CPU. epoch: which one the batch is of, from 0. share: how much of the whole
    batch this is, 1 unless other processes have a part of it.
    """

    index: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    host_index: torch.Tensor
    epoch: int
    share: float = 1.0


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(pixel / 255 - mean) / std: uint8 (N, H, W, 3) and (3,), (3,) to float32 (N, 3, H, W) in channels_last memory."""
    pixels = images.float().div_(255)
    return pixels.sub_(mean).div_(std).permute(0, 3, 1, 2)


class Batches:
    """The images of a split on a device, given batch by batch; the last, short batch is kept.

    shuffle: in an order that depends on (seed, epoch) alone. augment: a random crop with padding 4 (of black pixels)
    and a horizontal flip with probability 1/2 for every image, which depend on (seed, epoch, image) alone.
    processes: of several, each is given its part of every batch where they are shuffled, for training; where not, for
    testing, whole batches in turn, so that each is computed just as by one process.
    """

    def __init__(
        self, split: Split, mean: Statistics, std: Statistics, batch_size: int, device: torch.device,
        *, shuffle: bool = False, seed: int = 0, augment: bool = False, processes: Processes | None = None,
    ):  # fmt: skip
        self.split, self.labels = split, split.labels.to(device)
        self.size = split.images.shape[1]
        self.batch_size, self.device, self.processes = batch_size, device, processes or Processes()
        self.shuffle, self.seed, self.augment = shuffle, seed, augment
        # On the device from the start: a tensor made from Python's numbers in the step would wait for the device.
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.images = None if self.streams else self._padded(split.images.to(device))
        self.sides = torch.arange(self.size, device=device)

    @property
    def streams(self) -> bool:
        """Whether the images are decoded as they are asked for."""
        return isinstance(self.split.images, ImageFiles)

    @property
    def n_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.n_images // self.batch_size)

    def fingerprint(self) -> str:
        """Differs where the images or their normalisation do."""
        images = self.split.images
        digest = hashlib.sha256(images.key.encode() if self.streams else images.numpy())
        for tensor in (self.mean, self.std):
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()

    def order(self, epoch: int) -> torch.Tensor:
        """The images' indices in the order of that epoch, int64 (N,), on the CPU."""
        if not self.shuffle:
            return torch.arange(self.n_images)
        return torch.randperm(self.n_images, generator=_generator(self.seed, epoch, 0))

    def views(self, epoch: int) -> torch.Tensor:
        """How each image is seen in that epoch: int64 (N, 3) of crop offsets dy, dx in 0..8, and flip, on the CPU."""
        generator = _generator(self.seed, epoch, 1)
        offsets = torch.randint(OFFSETS, (self.n_images, 2), generator=generator)
        return torch.cat([offsets, torch.randint(2, (self.n_images, 1), generator=generator)], dim=1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch (from 0), from number `start` on, as if those before had been given."""
        whole, rank, size = self.order(epoch).split(self.batch_size)[start:], self.processes.rank, self.processes.size
        mine = [batch.tensor_split(size)[rank] for batch in whole] if self.shuffle else whole[rank::size]
        shares = [len(part) / len(batch) for part, batch in zip(mine, whole, strict=False)] if self.shuffle else None
        return self._give(mine, epoch, shares)

    def of(self, order: torch.Tensor, epoch: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the images with these indices (int64, on the CPU), as they are seen in that epoch."""
        return self._give(order.split(batch_size), epoch)

    def _give(self, parts: Sequence[torch.Tensor], epoch: int, shares: list[float] | None = None) -> Iterator[Batch]:
        if not parts:
            return
        views = self._move(self.views(epoch)) if self.augment else None
        indices = self._move(torch.cat(list(parts))).split([len(part) for part in parts])
        decoded = self.split.images.read(parts) if self.streams else None
        for number, (host_index, index) in enumerate(zip(parts, indices, strict=True)):
            if decoded is not None:
                source, at = self._padded(self._move(next(decoded))), torch.arange(len(index), device=self.device)
            else:
                source, at = self.images, index
            images = source[at] if views is None else self._crop(source, at, views[index])
            share = shares[number] if shares else 1.0
            pixels = normalise(images, self.mean, self.std)
            yield Batch(index, pixels, self.labels[index], host_index, epoch, share)

    def view_codes(self, epoch: int) -> torch.Tensor:
        """`views` as one number an image, int64 (N,) of 0..VIEWS - 1, on the CPU."""
        dy, dx, flip = self.views(epoch).unbind(1)
        return (dy * OFFSETS + dx) * 2 + flip

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        """The images with a black margin on all sides where they are to be cropped."""
        margin = (0, 0, PADDING, PADDING, PADDING, PADDING)
        return torch.nn.functional.pad(images, margin) if self.augment else images

    def _crop(self, padded: torch.Tensor, index: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Of the images with these indices, each one's own window, mirrored where its view says so: (B, H, W, 3)."""
        dy, dx, flip = views.unsqueeze(2).unbind(1)
        rows = dy + self.sides
        columns = dx + torch.where(flip.bool(), self.sides.flip(0), self.sides)
        return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """A generator on the CPU, so that all devices see the same order; SeedSequence mixes its numbers well."""
    state = np.random.SeedSequence([seed, epoch, purpose]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def load(name: str, data_dir: str | Path = "data", image_size: int | None = None, stream: bool = False) -> Dataset:
    """The data set of that name, one of DATASETS, read from data_dir.

    image_size: the side that images are resized to; for "folder" (32 if None) and "tiny_imagenet" (64 if None) alone.
    stream: leave these two on the disk and decode their images as they are asked for; done unasked, and said, where
    the decoded images would take more than half of the memory that is free.
    Raises UserError for a data set that is unknown, missing, damaged, or that can't be downloaded.
    """
    data_dir = Path(data_dir)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name}; there are {', '.join(DATASETS)}")
    if image_size is not None and name not in ("folder", "tiny_imagenet"):
        raise UserError(f"--image_size: the images of {name} have a fixed size; leave the flag away")
    if image_size is not None and image_size < 8:
        raise UserError(f"--image_size {image_size} is too small; the networks need 8 at least")
    if stream and name not in ("folder", "tiny_imagenet"):
        raise UserError(f"--stream: {name} comes in one piece, not as image files; leave the flag away")
    if name == "digits":
        return _digits()
    if name == "folder":
        return _images(name, data_dir, folder_files(data_dir), image_size or 32, stream)
    if name == "tiny_imagenet":
        root = tiny_imagenet_root(data_dir)
        return _images(name, root, tiny_imagenet_files(root), image_size or 64, stream)
    return _cifar(name, data_dir)


def _dataset(name: str, train: Split, test: Split, classes: tuple[str, ...]) -> Dataset:
    if name == "cifar100":
        return Dataset(name, train, test, classes, CIFAR100_MEAN, CIFAR100_STD)
    return Dataset(name, train, test, classes, *_statistics([train.images]))


def _statistics(parts: Iterable[torch.Tensor]) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel of the images in all parts, uint8 (B, H, W, 3) each.

    In float64, from how often each pixel value occurs, so that it does not matter how the images are parted.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for images in parts:
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(3)])
    pixels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts.double() / counts.double().sum(1, keepdim=True)
    mean = shares @ pixels
    std = (shares @ pixels**2 - mean**2).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0  # a channel of one value: nothing to stretch
    return tuple(mean.tolist()), tuple(std.tolist())


def _digits() -> Dataset:
    with np.load(DIGITS, allow_pickle=False) as arrays:
        train, test = (
            Split(
                torch.from_numpy(arrays[f"{part}_images"]).unsqueeze(3).expand(-1, -1, -1, 3).contiguous(),
                torch.from_numpy(arrays[f"{part}_labels"]).long(),
            )
            for part in ("train", "test")
        )
    return _dataset("digits", train, test, tuple("0123456789"))


def _cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 by torchvision, downloaded where it is not there yet."""
    kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    with contextlib.redirect_stdout(sys.stderr):  # torchvision's remarks are no figures
        try:
            parts = [kind(data_dir, train=train, download=False) for train in (True, False)]
        except RuntimeError:  # missing, or a file is not as its checksum says
            parts = _download_cifar(kind, name, data_dir)
    # torchvision gives a transposed view, whose memory no digest and no copy could read from end to end.
    arrays = [np.ascontiguousarray(part.data) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    train, test = (Split(torch.from_numpy(images), numbers) for images, numbers in zip(arrays, labels, strict=True))
    return _dataset(name, train, test, tuple(parts[0].classes))


def _download_cifar(kind: type[datasets.CIFAR10], name: str, data_dir: Path) -> list[datasets.CIFAR10]:
    try:
        return [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # no network; what came is damaged
        damaged = f"{data_dir / kind.base_folder} is incomplete or damaged, and " if _exists(kind, data_dir) else ""
        raise UserError(
            f"{damaged}{name} can't be downloaded ({error}); put {kind.filename} (from {kind.url}) into {data_dir}, "
            "or use --dataset digits or --dataset folder, which need no network"
        ) from None


def _exists(kind: type[datasets.CIFAR10], data_dir: Path) -> bool:
    return (data_dir / kind.base_folder).exists() or (data_dir / kind.filename).exists()


def _images(name: str, root: Path, listing: Files, size: int, stream: bool) -> Dataset:
    """The data set of these image files, decoded or, to stream or where that would not fit the memory, not."""
    classes = tuple(sorted({label for _, label in listing["train"]}))
    number = {label: index for index, label in enumerate(classes)}
    labels = {part: torch.tensor([number[label] for _, label in found]) for part, found in listing.items()}
    key = fingerprint(root, listing, size)
    needed, there = size * size * 3 * sum(map(len, listing.values())), free_memory(torch.device("cpu"))
    if not stream and 0 < there < 2 * needed:
        stream = True
        say(f"streaming: decoded, the images would take {needed / 1e9:.1f} GB, of memory {there / 1e9:.1f} GB are free")
    if not stream:
        images = decoded(root, listing, size, key)
        return _dataset(name, *(Split(torch.from_numpy(images[part]), labels[part]) for part in listing), classes)
    train, test = (Split(ImageFiles([path for path, _ in listing[part]], size, key), labels[part]) for part in listing)
    return Dataset(name, train, test, classes, *_streamed_statistics(train.images, root))


def _streamed_statistics(images: ImageFiles, root: Path) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation, from one pass over the files, or as kept beside them since the last one."""
    path = root / f".statistics_{images.shape[1]}.json"
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == images.key:
            return tuple(kept["mean"]), tuple(kept["std"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    mean, std = _statistics(images.read(torch.arange(len(images)).split(250)))
    try:
        files.write_json({"key": images.key, "mean": mean, "std": std}, path)
    except UserError as error:
        say(f"the images' mean is not kept, the next start reads them all again ({error})")
    return mean, std
