"""Data sets, in memory or streamed from image files; batches of them on the device; augmentation.

The digits (digits.npz) are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0: 1,797 images of 8x8 pixels, their
values 0..16 stretched to 0..255. The split is fixed and stratified: of each class, shuffled, the first 297/1797 are for
testing.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets

from images import cifar
from images.folders import (
    TEST,
    Found,
    ImageFiles,
    decoded,
    find,
    fingerprint,
    image_digests,
    readable,
    refuse_unreadable,
    roots,
)
from images.listed import find_csv, find_parquet
from images.packed import Row
from util import files, parsed
from util.bounds import MEAN, STD
from util.mixing import Draw, Mixed, Mixing
from util.processes import Processes
from util.runtime import UserError, free_memory, say, send
from util.text import printable

DATASETS = ("cifar100", "cifar10", "tiny_imagenet", "folder", "csv", "parquet", "digits")
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, as torchvision gives them
DIGITS = Path(__file__).with_name("digits.npz")
PADDING = 4  # of the random crop, in pixels
OFFSETS = 2 * PADDING + 1  # of the crop's window, down and across
VIEWS = OFFSETS * OFFSETS * 2  # and flipped or not
LARGE = 64  # the side above which images are augmented as large ones are: resized crops, not shifted ones
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of torchvision's RandomResizedCrop
RESIZED = ("folder", "csv", "parquet", "tiny_imagenet")  # the data sets whose images come in any size
FINDERS = {"folder": find, "csv": find_csv, "parquet": find_parquet}
UNEQUAL = 3  # times as many training images of one class as of another are told of
HELD_OUT_SEED = 20  # of its own: the same images are held out whatever a run's seed

Statistics = tuple[float, float, float]  # one value for each of red, green and blue


class Split(NamedTuple):
    """images: uint8 (N, H, W, 3), contiguous, or the files they are decoded from; labels: int64 (N,)."""

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor


class Fingerprints(NamedTuple):
    """Of a data set: of all its images and labels, and of those for testing."""

    whole: str
    test: str


@dataclass(frozen=True)
class Dataset:
    """A data set, with the statistics of its training images' channels, pixels taken as 0 to 1.

    train: None where there are none, to test alone. val: training images that are held out (`holding_out`); they are
    none of train's. measured: the fingerprints where they are known already, as of streamed images. official_order: the
    indices of the test images in the order of CIFAR's official files, int64 (N,); None where these were not read.
    """

    name: str
    train: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: Statistics
    std: Statistics
    val: Split | None = None
    measured: Fingerprints | None = None
    official_order: torch.Tensor | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where an image or a label does; the same streamed or not, and with images held out or not."""
        return self.measured.whole if self.measured else _digest(*filter(None, (self.train, self.test)))

    @functools.cached_property
    def test_fingerprint(self) -> str:
        """`fingerprint` of the test images alone: results that share it were tested on the same images, in order."""
        return self.measured.test if self.measured else _digest(self.test)

    @property
    def image_size(self) -> int:
        """The side of the images, which are square."""
        return self.test.images.shape[1]

    def holding_out(self, fraction: float) -> "Dataset":
        """The same data set, but this part of the training images is in val. Raises UserError as `held_out` does."""
        train, val = held_out(self.train, fraction, self.num_classes)
        measured = Fingerprints(self.fingerprint, self.test_fingerprint)  # of the undivided
        return dataclasses.replace(self, train=train, val=val, measured=measured)


def held_out(split: Split, fraction: float, num_classes: int) -> tuple[Split, Split]:
    """The split without this part of each class, and the part; the same images for every run, in their order.

    Of a class with two images or more at least one is held out. Raises UserError where a class would keep none.
    """
    generator, held, bare = torch.Generator().manual_seed(HELD_OUT_SEED), [], 0
    for label in range(num_classes):
        members = (split.labels == label).nonzero().flatten()
        n = max(1, int(fraction * len(members) + 0.5)) if len(members) > 1 else 0
        bare += 0 < len(members) <= n
        held.append(members[torch.randperm(len(members), generator=generator)[:n]])
    if bare:
        raise UserError(
            f"--val_fraction {fraction:g} leaves {bare} of {num_classes} classes without a training image; lower it"
        )
    mask = torch.zeros(len(split.labels), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return subset(split, (~mask).nonzero().flatten()), subset(split, mask.nonzero().flatten())


def subset(split: Split, index: torch.Tensor) -> Split:
    images = split.images
    return Split(images.subset(index) if isinstance(images, ImageFiles) else images[index], split.labels[index])


def _digest(*parts: Split) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for images in _pieces(part.images):
            digest.update(images.numpy())
        digest.update(part.labels.numpy())
    return digest.hexdigest()[:32]


def _pieces(images: torch.Tensor | ImageFiles) -> Iterable[torch.Tensor]:
    """All images, in order, uint8 (B, H, W, 3) at a time."""
    return images.read(images.in_order()) if isinstance(images, ImageFiles) else [images]


class Batch(NamedTuple):
    """index: int64 (B,), which images of the split; images: float32 (B, 3, H, W), channels last; labels: int64 (B,).

    host_index: the index once more, on the CPU. epoch: which one the batch is of, from 0. share: how much of the whole
    batch this is, 1 unless other processes have a part of it. mixed: the other labels, where each image is a mixture of
    the one in the index and another; then labels are those of the images with the greater part.
    """

    index: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    host_index: torch.Tensor
    epoch: int
    share: float = 1.0
    mixed: Mixed | None = None


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(pixel / 255 - mean) / std: uint8 (N, H, W, 3) and (3,), (3,) to float32 (N, 3, H, W) in channels_last memory."""
    pixels = images.float().div_(255)
    return pixels.sub_(mean).div_(std).permute(0, 3, 1, 2)


class Batches:
    """The images of a split on a device, given batch by batch; the last, short batch is kept.

    shuffle: in an order that depends on (seed, epoch) alone. augment: a random crop with padding 4 (of black pixels),
    or of images larger than 64 pixels torchvision's RandomResizedCrop, and a horizontal flip with probability 1/2 for
    every image, which depend on (seed, epoch, image) alone. mixing: of the images of each shuffled batch, which depends
    on (seed, epoch) alone.
    processes: of several, each is given its part of every batch where they are shuffled, for training; where not, for
    testing, whole batches in turn, so that each is computed just as by one process.
    """

    def __init__(
        self, split: Split, mean: Statistics, std: Statistics, batch_size: int, device: torch.device,
        *, shuffle: bool = False, seed: int = 0, augment: bool = False, mixing: Mixing | None = None,
        processes: Processes | None = None,
    ):  # fmt: skip
        self.split, self.labels = split, split.labels.to(device)
        self.size = split.images.shape[1]
        self.batch_size, self.device, self.processes = batch_size, device, processes or Processes()
        self.shuffle, self.seed, self.augment, self.mixing = shuffle, seed, augment, mixing
        # On the device from the start: a tensor made from Python's numbers in the step would wait for the device.
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.images = self._padded(split.images.to(device)) if self._fits() else None
        self.sides = torch.arange(self.size, device=device)

    @property
    def streams(self) -> bool:
        """Whether the images are decoded as they are asked for."""
        return isinstance(self.split.images, ImageFiles)

    @property
    def resizes(self) -> bool:
        """Whether augmented images are resized crops, of which there are too many kinds to come again."""
        return self.augment and self.size > LARGE

    def _fits(self) -> bool:
        """Whether the images can lie on the device; those in memory that can't are moved there batch by batch."""
        if self.streams or self.device.type == "cpu":
            return not self.streams
        free = free_memory(self.device)  # 0: not known
        return not 0 < free < 2 * self.split.images.nbytes

    @property
    def n_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-self.n_images // self.batch_size)

    def fingerprint(self) -> str:
        """Differs where the images or their normalisation do; the same streamed or not."""
        digest = hashlib.sha256(image_digests(self.split.images))
        for tensor in (self.mean, self.std):
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()

    def order(self, epoch: int) -> torch.Tensor:
        """The images' indices in the order of that epoch, int64 (N,), on the CPU."""
        if not self.shuffle:
            return torch.arange(self.n_images)
        return torch.randperm(self.n_images, generator=_generator(self.seed, epoch, 0))

    def views(self, epoch: int) -> torch.Tensor:
        """How each image is seen in that epoch: int64 (N, 3) of crop offsets dy, dx in 0..8, and flip, on the CPU.

        Of large images (N, 5): the crop's top, left, height and width, and flip.
        """
        generator = _generator(self.seed, epoch, 1)
        if self.resizes:
            crops = _resized_crops(self.n_images, self.size, generator)
        else:
            crops = torch.randint(OFFSETS, (self.n_images, 2), generator=generator)
        return torch.cat([crops, torch.randint(2, (self.n_images, 1), generator=generator)], dim=1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch (from 0), from number `start` on, as if those before had been given."""
        whole, rank, size = self.order(epoch).split(self.batch_size)[start:], self.processes.rank, self.processes.size
        mine = [batch.tensor_split(size)[rank] for batch in whole] if self.shuffle else whole[rank::size]
        shares = [len(part) / len(batch) for part, batch in zip(mine, whole, strict=False)] if self.shuffle else None
        if not self.mixing:
            return self._give(mine, epoch, shares)
        draws = self.mixing.draw(self.seed, epoch, len(self), self.size)[start:]
        wider = [_with_the_one_before(batch, rank, size) for batch in whole]
        return map(_mixed, self._give(wider, epoch, shares), draws)

    def of(self, order: torch.Tensor, epoch: int, batch_size: int) -> Iterator[Batch]:
        """Batches of the images with these indices (int64, on the CPU), as they are seen in that epoch."""
        return self._give(order.split(batch_size), epoch)

    def _give(self, parts: Sequence[torch.Tensor], epoch: int, shares: list[float] | None = None) -> Iterator[Batch]:
        if not parts:
            return
        views = self._move(self.views(epoch)) if self.augment else None
        indices = self._move(torch.cat(list(parts))).split([len(part) for part in parts])
        fetched = self._fetch(parts) if self.images is None else None
        for number, (host_index, index) in enumerate(zip(parts, indices, strict=True)):
            if fetched is not None:
                source, at = self._padded(self._move(next(fetched))), torch.arange(len(index), device=self.device)
            else:
                source, at = self.images, index
            if views is None:
                images = source[at]
            elif self.resizes:
                images = resized_crop(source[at], views[index])
            else:
                images = self._crop(source, at, views[index])
            share = shares[number] if shares else 1.0
            pixels = normalise(images, self.mean, self.std)
            yield Batch(index, pixels, self.labels[index], host_index, epoch, share)

    def _fetch(self, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The images of each part, on the CPU."""
        return self.split.images.read(parts) if self.streams else (self.split.images[part] for part in parts)

    def view_codes(self, epoch: int) -> torch.Tensor:
        """`views` of small images as one number an image, int64 (N,) of 0..VIEWS - 1, on the CPU."""
        dy, dx, flip = self.views(epoch).unbind(1)
        return (dy * OFFSETS + dx) * 2 + flip

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return send(tensor, self.device)

    def _padded(self, images: torch.Tensor) -> torch.Tensor:
        """The images with a black margin on all sides where they are to be cropped."""
        margin = (0, 0, PADDING, PADDING, PADDING, PADDING)
        return torch.nn.functional.pad(images, margin) if self.augment and not self.resizes else images

    def _crop(self, padded: torch.Tensor, index: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Of the images with these indices, each one's own window, mirrored where its view says so: (B, H, W, 3)."""
        dy, dx, flip = views.unsqueeze(2).unbind(1)
        rows = dy + self.sides
        columns = dx + torch.where(flip.bool(), self.sides.flip(0), self.sides)
        return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _with_the_one_before(batch: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A process's part of the batch, and in front the element before it; the last one is before the first."""
    part, before = (indices.tensor_split(size)[rank] for indices in (batch, batch.roll(1)))
    return torch.cat([before[:1], part])


def _mixed(batch: Batch, draw: Draw) -> Batch:
    """The batch without its first image, each mixed with the one before it."""
    images, labels, other = draw.mix(batch.images, batch.labels)
    index, host_index = batch.index[1:], batch.host_index[1:]
    return batch._replace(index=index, images=images, labels=labels, host_index=host_index, mixed=other)


def _resized_crops(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """n random crops of an image of this size, as RandomResizedCrop draws them: int64 (n, 4), top, left, height, width.

    Of TRIES crops the first that fits the image; where none does, the whole image.
    """
    areas, ratios = torch.rand(2, n, TRIES, dtype=torch.float64, generator=generator)
    areas = size**2 * (SCALE[0] + (SCALE[1] - SCALE[0]) * areas)
    least, most = map(math.log, RATIO)
    ratios = (least + (most - least) * ratios).exp()
    sides = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], dim=2).round().long()
    fits = (sides <= size).all(2)
    first = fits.int().argmax(1)  # of several the first
    rows = torch.arange(n)
    sides = torch.where(fits[rows, first, None], sides[rows, first], size)
    # Whole numbers, so that no rounding can lead out of the image; so few of 2^31 that they stay as likely.
    corners = torch.randint(1 << 31, (n, 2), generator=generator) % (size - sides + 1)
    return torch.cat([corners, sides], dim=1)


def resized_crop(images: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """Of each image its crop, stretched to the image's size and mirrored where its view says so.

    images: uint8 (B, S, S, 3). views: int64 (B, 5), top, left, height, width, flip. Gives float32 (B, S, S, 3), 0..255.
    Bilinear; as a crop is never scaled down, antialiasing would change nothing.
    """
    size = images.shape[1]
    top, left, height, width, flip = views.unsqueeze(2).unbind(1)
    y, x = (_stretched(start, length, size) for start, length in ((top, height), (left, width)))
    x = torch.where(flip.bool(), x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=3)
    pixels = torch.nn.functional.grid_sample(images.float().permute(0, 3, 1, 2), grid, align_corners=False)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _stretched(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Where along its side each of `size` pixels is taken from, (B, size), as grid_sample counts, -1 to 1.

    start, length: of the crop, (B, 1). Nothing is taken from beyond the crop's own outermost pixels.
    """
    centres = (torch.arange(size, device=start.device) + 0.5) * (length / size) - 0.5
    at = start + torch.minimum(centres.clamp(min=0), length - 1)
    return (2 * at + 1) / size - 1


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """A generator on the CPU, so that all devices see the same order."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch, purpose))


def mixed_seed(*numbers: int) -> int:
    """A seed that depends on all the numbers; SeedSequence mixes them well."""
    state = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(state[0]) << 31 | int(state[1]) >> 1


class TrainedWith(NamedTuple):
    """What a network was trained with."""

    classes: tuple[str, ...]
    mean: Statistics
    std: Statistics


def load(
    name: str, data_dir: str | Path = "data", image_size: int | None = None, stream: bool = False,
    classes: tuple[str, ...] | None = None, mean: Statistics | None = None, std: Statistics | None = None,
    *, skip_unreadable: bool = False,
) -> Dataset:  # fmt: skip
    """The data set of that name, one of DATASETS, read from data_dir.

    image_size: the side that images are resized to, 32 if None, of "tiny_imagenet" 64; for those of RESIZED alone.
    skip_unreadable: leave out images of these that can't be read, and say so.
    stream: leave these on the disk and decode their images as they are asked for; done unasked, and said, where
    the decoded images would take more than half of the memory that is free.
    classes, mean, std: those of a network to be tested, all or none: labels are numbered by these classes, and train is
    None where its images are missing or are of other classes, too.
    Raises UserError for a data set that is unknown, missing, damaged, or that can't be downloaded.
    """
    data_dir = _expanded(data_dir)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name}; there are {', '.join(DATASETS)}")
    if image_size is not None and name not in RESIZED:
        raise UserError(f"--image_size: the images of {name} have a fixed size; leave the flag away")
    if image_size is not None and image_size < 8:
        raise UserError(f"--image_size {image_size} is too small; the networks need 8 at least")
    if stream and name not in RESIZED:
        raise UserError(f"--stream: {name} comes in one piece, not as image files; leave the flag away")
    trained = TrainedWith(tuple(classes), tuple(mean), tuple(std)) if classes and mean and std else None
    if skip_unreadable and name not in RESIZED:
        raise UserError(f"--skip_unreadable: {name} comes whole or not at all; leave the flag away")
    if name in RESIZED:
        found = (
            _tiny_imagenet(data_dir, trained) if name == "tiny_imagenet" else FINDERS[name](data_dir, classes=classes)
        )
        size = image_size or (64 if name == "tiny_imagenet" else 32)
        return _images(name, readable(found, size) if skip_unreadable else found, size, stream, trained)
    dataset = _digits() if name == "digits" else _cifar(name, data_dir)
    return _as_trained(dataset, trained) if trained else dataset


def _expanded(data_dir: str | Path) -> Path:
    try:
        return Path(data_dir).expanduser()
    except RuntimeError as error:  # ~somebody whom the system does not know
        raise UserError(f"--data_dir {data_dir}: {error}") from None


def _as_trained(dataset: Dataset, trained: TrainedWith) -> Dataset:
    """The data set for the network to be tested on. Raises UserError for a test class that it does not know."""
    test = _numbered(dataset.test, dataset.classes, trained.classes)
    if test is None:
        unknown = sorted({dataset.classes[label] for label in dataset.test.labels.unique()} - set(trained.classes))
        raise UserError(f"{dataset.name}: the network was trained on other classes; it does not know {unknown[0]}")
    train = dataset.train and _numbered(dataset.train, dataset.classes, trained.classes)
    return dataclasses.replace(dataset, train=train, test=test, **trained._asdict())


def _numbered(split: Split, own: tuple[str, ...], classes: tuple[str, ...]) -> Split | None:
    """The split, its labels, numbers in `own`, as those in `classes`; None where one of them is missing there."""
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for name in own])[split.labels]
    return None if (labels < 0).any() else Split(split.images, labels)


def _dataset(name: str, train: Split, test: Split, classes: tuple[str, ...]) -> Dataset:
    if name == "cifar100":
        return Dataset(name, train, test, classes, CIFAR100_MEAN, CIFAR100_STD)
    return Dataset(name, train, test, classes, *_statistics(_value_counts(train.images)))


def _value_counts(images: torch.Tensor) -> torch.Tensor:
    """How often each pixel value occurs in each channel of uint8 (B, H, W, 3): int64 (3, 256)."""
    parts = images.split(1000)  # to need no copy of all
    return sum(
        torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(3)]) for part in parts
    )


def _statistics(counts: torch.Tensor) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel, from `_value_counts`: it does not matter how images are parted."""
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
    """CIFAR-10 or CIFAR-100 from any copy in data_dir, downloaded where there is none."""
    kind = cifar.KINDS[name]
    parts = cifar.read(kind, data_dir)
    if parts is None:
        _download_cifar(name, data_dir)
        parts = cifar.read(kind, data_dir)
    train, test = (Split(torch.from_numpy(parts[part].images), torch.from_numpy(parts[part].labels)) for part in parts)
    places = parts["test"].places
    dataset = _dataset(name, train, test, kind.classes)
    return dataset if places is None else dataclasses.replace(dataset, official_order=torch.from_numpy(places))


def _download_cifar(name: str, data_dir: Path) -> None:
    kind = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    archive = data_dir / kind.filename
    damaged = f"{archive} is incomplete or damaged, and " if archive.exists() else ""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torchvision's remarks are no figures
            kind(data_dir, download=True)
    except (OSError, RuntimeError) as error:  # no network; what came is damaged
        raise UserError(
            f"{damaged}{name} can't be downloaded ({error}); put {kind.filename} (from {kind.url}) into {data_dir}, "
            "or use --dataset digits or --dataset folder, which need no network"
        ) from None


def _tiny_imagenet(data_dir: Path, trained: TrainedWith | None) -> Found:
    """Its labelled validation images are the test images; those in test/ have no labels."""
    root = data_dir / "tiny-imagenet-200"
    root = root if root.is_dir() else data_dir
    if not roots(root) and not trained:
        raise UserError(f"{data_dir} holds no tiny-imagenet-200 folder; unpack tiny-imagenet-200.zip there")
    return find(root, ("val", *(name for name in TEST if name != "val")), trained and trained.classes)


def _images(name: str, found: Found, size: int, stream: bool, trained: TrainedWith | None) -> Dataset:
    """The data set of these image files, decoded or, to stream or where that would not fit the memory, not."""
    listing = found.files
    own = found.classes or tuple(sorted({label for images in listing.values() for _, label in images}))
    classes = trained.classes if trained else own
    if len(classes) < 2:
        raise UserError(
            f"{printable(found.root)} has one class alone, {own[0]}; to tell apart there must be two at least"
        )
    if too_long := [name for name in classes if len(name) > parsed.LONGEST]:
        raise UserError(
            f"{printable(found.root)}: a class's name has more than {parsed.LONGEST} letters: {too_long[0][:80]}..."
        )
    number = {label: index for index, label in enumerate(classes)}
    if any(label not in number for _, label in listing.get("train", ())):  # another data set's, to test on alone
        listing = {"test": listing["test"]}
        found = found._replace(files=listing)
    labels = {part: torch.tensor([number[label] for _, label in images]) for part, images in listing.items()}
    if not trained:
        _say_unequal(labels["train"], classes)
    needed, there = size * size * 3 * sum(map(len, listing.values())), free_memory(torch.device("cpu"))
    if not stream and 0 < there < 2 * needed:
        stream = True
        say(f"streaming: decoded, the images would take {needed / 1e9:.1f} GB, of memory {there / 1e9:.1f} GB are free")
    if stream:
        paths = {part: [path for path, _ in images] for part, images in listing.items()}
        key = hashlib.sha256(fingerprint(found, size).encode() + b"".join(x.numpy() for x in labels.values()))
        measured = _measured(paths, labels, size, found.kept(f"statistics_{size}.json"), key.hexdigest())
        images = {part: ImageFiles(paths[part], size, measured.digests[part]) for part in listing}
        mean, std, fingerprints = measured.mean, measured.std, measured.fingerprints
    else:
        images = {part: torch.from_numpy(array) for part, array in decoded(found, size).items()}
        (mean, std), fingerprints = trained[1:] if trained else _statistics(_value_counts(images["train"])), None
    splits = {part: Split(images[part], labels[part]) for part in listing}
    dataset = Dataset(name, splits.get("train"), splits["test"], classes, mean, std, measured=fingerprints)
    return dataclasses.replace(dataset, mean=trained.mean, std=trained.std) if trained else dataset


def _say_unequal(labels: torch.Tensor, classes: tuple[str, ...]) -> None:
    """A line where some class has few training images beside another."""
    counts = labels.bincount(minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] > UNEQUAL * counts[least]:
        say(
            f"unequal classes: train has {counts[least]:,} of {classes[least]}, but {counts[most]:,} of {classes[most]}"
        )


class Measured(NamedTuple):
    """What one pass over image files tells: mean and std of the first part; of each, its images' digests."""

    mean: Statistics
    std: Statistics
    fingerprints: Fingerprints
    digests: dict[str, np.ndarray]


def _measured(
    paths: dict[str, list[Path | Row]], labels: dict[str, torch.Tensor], size: int, path: Path, key: str
) -> Measured:
    """From one pass over the files, or as kept in `path` since the last one, where nothing changed."""
    measured = _read_measured(path, key, {part: len(own) for part, own in paths.items()})
    if measured is None:
        measured = _measure({part: Split(ImageFiles(paths[part], size), labels[part]) for part in paths})
        digests = {part: base64.b64encode(own).decode() for part, own in measured.digests.items()}
        try:
            files.write_json(files.sealed({"key": key, **measured._asdict(), "digests": digests}), path)
        except UserError as error:
            say(f"the images' mean is not kept, the next start reads them all again ({error})")
    return measured


def _read_measured(path: Path, key: str, counts: dict[str, int]) -> Measured | None:
    """What `_measured` kept of so many images in each part; None where it is missing, damaged or of others."""
    checks = {
        "key": lambda value: value == key,
        "mean": parsed.list_of(MEAN.fits, 3, 3),
        "std": parsed.list_of(STD.fits, 3, 3),
        "fingerprints": parsed.list_of(parsed.text, 2, 2),
        "digests": lambda value: parsed.a_dict(value) and value.keys() == counts.keys(),
    }
    try:
        files.ensure_regular(path)
        kept = files.unsealed(parsed.loads(path.read_bytes()))
        if parsed.flaw(kept, checks, checks):
            return None
        digests = {
            part: np.frombuffer(base64.b64decode(kept["digests"][part]), np.uint8).reshape(count, 16)
            for part, count in counts.items()
        }
        return Measured(tuple(kept["mean"]), tuple(kept["std"]), Fingerprints(*kept["fingerprints"]), digests)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _measure(splits: dict[str, Split]) -> Measured:
    """Read all images once. Raises UserError that names all that can't be read."""
    whole, counts, digests, problems = hashlib.sha256(), [], {}, []
    for part, split in splits.items():
        alone, own, values = hashlib.sha256(), [], torch.zeros(3, 256, dtype=torch.int64)
        for images in split.images.read(split.images.in_order(), problems):
            for digest in (whole, alone):
                digest.update(images.numpy())
            own.append(image_digests(images))
            values += _value_counts(images)
        for digest in (whole, alone):
            digest.update(split.labels.numpy())
        digests[part] = np.concatenate(own)
        counts.append(values)
    refuse_unreadable(problems)  # the last part is test
    return Measured(*_statistics(counts[0]), Fingerprints(whole.hexdigest()[:32], alone.hexdigest()[:32]), digests)
