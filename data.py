"""Data sets as tensors on the device, batches of them, augmentation.

The digits (digits.npz) are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0: 1,797 images of 8x8 pixels, their
values 0..16 stretched to 0..255. The split is fixed and stratified: of each class, shuffled, the first 297/1797 are for
testing.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from util import cifar, images
from util.images import ImageFiles, Statistics, statistics
from util.images import read_image as _read_image  # noqa: F401, by which others decode as is done here
from util.processes import Processes
from util.runtime import UserError, free_memory, say

DATASETS = ("cifar100", "cifar10", "tiny_imagenet", "folder", "digits")
RESIZED = {"folder": 32, "tiny_imagenet": 64}  # those of image files, and the side they are resized to unless told
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
DIGITS = Path(__file__).with_name("digits.npz")
PADDING = 4  # of the random crop, in pixels
OFFSETS = 2 * PADDING + 1  # of the crop's window, down and across
VIEWS = OFFSETS * OFFSETS * 2  # and flipped or not
HELD_OUT_SEED = 1  # which training images are held out is the same for all runs


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, H, W, 3), contiguous, or the files they are decoded from; labels: int64 (N,).

    known_digest: that of the pixels, where they are not at hand to be asked.
    """

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor
    known_digest: str | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Differs where a pixel does, whether the images are decoded or streamed."""
        return self.known_digest or hashlib.sha256(self.images.numpy()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A data set, with the statistics of its training images' channels, pixels taken as 0 to 1.

    train: None where only a checkpoint is to be tested. val: training images that are held out of train.
    """

    name: str
    train: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: Statistics
    std: Statistics
    val: Split | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where an image or a label does."""
        return _fingerprint(self.train, self.test)

    @functools.cached_property
    def test_fingerprint(self) -> str:
        """`fingerprint` of the test images alone: results that share it were tested on the same images, in order."""
        return _fingerprint(self.test)

    @property
    def image_size(self) -> int:
        """The side of the images, which are square."""
        return self.test.images.shape[1]


def _fingerprint(*parts: Split) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.digest.encode())
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
        digest = hashlib.sha256(self.split.digest.encode())
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


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    stream: bool = False,
    *,
    classes: tuple[str, ...] | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
) -> Dataset:
    """The data set of that name, one of DATASETS, read from data_dir.

    image_size: the side that images are resized to; for "folder" (32 if None) and "tiny_imagenet" (64 if None) alone.
    stream: leave these two on the disk and decode their images as they are asked for; done unasked, and said, where
    the decoded images would take more than half of the memory that is free.
    classes, mean, std: of a checkpoint that is to be tested: its classes number the labels, and image files need no
    train/. Raises UserError for a data set that is unknown, missing, damaged, or that can't be downloaded.
    """
    data_dir = Path(data_dir).expanduser()
    if name not in DATASETS:
        raise UserError(f"unknown data set {name}; there are {', '.join(DATASETS)}")
    if image_size is not None and name not in RESIZED:
        raise UserError(f"--image_size: the images of {name} have a fixed size; leave the flag away")
    if image_size is not None and image_size < 8:
        raise UserError(f"--image_size {image_size} is too small; the networks need 8 at least")
    if stream and name not in RESIZED:
        raise UserError(f"--stream: {name} comes in one piece, not as image files; leave the flag away")
    if name == "digits":
        dataset = _digits()
    elif name in RESIZED:
        dataset = _of_files(name, data_dir, image_size or RESIZED[name], stream, classes, (mean, std))
    else:
        dataset = _cifar(name, data_dir)
    return _numbered(dataset, classes) if classes and classes != dataset.classes else dataset


def _numbered(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """The data set with the test labels' numbers by another order of the classes. Raises UserError for a class more."""
    number = {label: index for index, label in enumerate(classes)}
    there = [dataset.classes[index] for index in dataset.test.labels.unique().tolist()]
    if unknown := [label for label in there if label not in number]:
        raise UserError(
            f"the test images are of other classes than the checkpoint's: {images.some(unknown)}; it knows "
            f"{images.some(classes)}"
        )
    translated = torch.tensor([number.get(label, -1) for label in dataset.classes])[dataset.test.labels]
    test = Split(dataset.test.images, translated, dataset.test.known_digest)
    return Dataset(dataset.name, None, test, classes, dataset.mean, dataset.std)


def held_out(split: Split, fraction: float, num_classes: int) -> tuple[Split, Split]:
    """The training images that remain, and those that are held out: of each class the fraction, rounded, drawn once
    and for all runs. Raises UserError where that leaves a class, or either part, without an image.
    """
    generator, chosen = torch.Generator().manual_seed(HELD_OUT_SEED), torch.zeros(len(split.labels), dtype=torch.bool)
    for label in range(num_classes):
        members = (split.labels == label).nonzero().squeeze(1)
        take = round(fraction * len(members))
        if take == len(members):
            raise UserError(
                f"--val_fraction {fraction:g} leaves a class of {len(members)} images without any; lower it"
            )
        chosen[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    if not chosen.any():
        raise UserError(f"--val_fraction {fraction:g} holds out no image of any class; raise it")
    return _subset(split, ~chosen), _subset(split, chosen)


def _subset(split: Split, chosen: torch.Tensor) -> Split:
    index = chosen.nonzero().squeeze(1)
    digest = hashlib.sha256(split.digest.encode() + index.numpy().tobytes()).hexdigest()
    streamed = isinstance(split.images, ImageFiles)
    return Split(split.images.subset(index) if streamed else split.images[index], split.labels[index], digest)


def _digits() -> Dataset:
    with np.load(DIGITS, allow_pickle=False) as arrays:
        train, test = (
            Split(
                torch.from_numpy(arrays[f"{part}_images"]).unsqueeze(3).expand(-1, -1, -1, 3).contiguous(),
                torch.from_numpy(arrays[f"{part}_labels"]).long(),
            )
            for part in ("train", "test")
        )
    return Dataset("digits", train, test, tuple("0123456789"), *statistics(train.images))


def _cifar(name: str, data_dir: Path) -> Dataset:
    *parts, classes = cifar.load(name, data_dir)
    train, test = (Split(torch.from_numpy(part.images), torch.from_numpy(part.labels)) for part in parts)
    # CIFAR-100's are those of the reference.
    mean, std = (CIFAR100_MEAN, CIFAR100_STD) if name == "cifar100" else statistics(train.images)
    return Dataset(name, train, test, classes, mean, std)


def _of_files(
    name: str,
    data_dir: Path,
    size: int,
    stream: bool,
    classes: tuple[str, ...] | None,
    normalisation: tuple[Statistics | None, Statistics | None],
) -> Dataset:
    """The data set of the image files there, decoded or, to stream or where that would not fit the memory, not."""
    found = images.find(data_dir, classes)
    key, parts = images.key_of(found, size), {"train": found.train, "test": found.test}
    parts = {part: listed for part, listed in parts.items() if listed is not None}
    classes = tuple(sorted({label for _, label in found.train})) if found.train else classes
    number = {label: index for index, label in enumerate(classes)}
    labels = {part: torch.tensor([number[label] for _, label in listed]) for part, listed in parts.items()}
    needed, there = size * size * 3 * sum(map(len, parts.values())), free_memory(torch.device("cpu"))
    if not stream and 0 < there < 2 * needed:
        stream = True
        say(f"streaming: decoded, the images would take {needed / 1e9:.1f} GB, of memory {there / 1e9:.1f} GB are free")
    if stream:
        told = images.known(found, size, key)
        splits = {
            part: Split(ImageFiles([path for path, _ in listed], size), labels[part], getattr(told, part))
            for part, listed in parts.items()
        }
        measured = (told.mean, told.std) if found.train else normalisation
    else:
        pixels = images.decoded(found, size, key)
        splits = {part: Split(torch.from_numpy(pixels[part]), labels[part]) for part in parts}
        measured = statistics(splits["train"].images) if found.train else normalisation
    return Dataset(name, splits.get("train"), splits["test"], classes, *measured)
