"""Mixup and cutmix: batches of images that are mixtures of two each, with the labels of both."""

from typing import NamedTuple

import numpy as np
import torch

PURPOSE = 2  # of the random numbers; 0 and 1 are the images' order and their views


class Mixed(NamedTuple):
    """The other image's labels, int64 (B,), and the part, 0 to 0.5, that it has in each image of the batch."""

    labels: torch.Tensor
    part: float


class Mixing(NamedTuple):
    """How batches are mixed: the parameters of the Beta distributions; 0: not in this way.

    mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018): lam x + (1 - lam) x', lam from
    Beta(mixup, mixup). cutmix: Yun et al., "CutMix" (2019): of x' a box, cut off at the border, whose sides are
    sqrt(1 - lam) of the image's, its centre anywhere, lam from Beta(cutmix, cutmix); then lam is the part of x that is
    left. One of the two for each batch, at random, and one lam; x' is the image before x in the batch.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def draw(self, seed: int, epoch: int, batches: int, size: int) -> list["Draw"]:
        """How each batch of that epoch is mixed, of images of that size; depends on these numbers alone."""
        # Of this generator numpy promises that its numbers stay the same.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch, PURPOSE])))
        ways = [way for way in ("mixup", "cutmix") if getattr(self, way)]
        drawn = []
        for _ in range(batches):
            way = ways[random.randint(len(ways))]
            alpha = getattr(self, way)
            lam, centre = random.beta(alpha, alpha), random.randint(size, size=2)
            drawn.append(Draw(lam, None) if way == "mixup" else _cut(lam, *map(int, centre), size))
        return drawn


class Draw(NamedTuple):
    """How one batch is mixed: lam, the part of each image that is its own; of cutmix the box, else None.

    box: top, bottom, left, right of what is the other image's, in pixels.
    """

    lam: float
    box: tuple[int, int, int, int] | None

    def mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Mixed]:
        """Each image but the first, mixed with the one before it; the labels of the greater parts, and the others.

        images: (B + 1, 3, H, W), labels: int64 (B + 1,), from which come B of each.
        """
        own, other = images[1:], images[:-1]
        if self.box is None:
            mixed = own * self.lam + other * (1 - self.lam)
        else:
            top, bottom, left, right = self.box
            mixed = own.clone()
            mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        if self.lam >= 0.5:
            return mixed, labels[1:], Mixed(labels[:-1], 1 - self.lam)
        return mixed, labels[:-1], Mixed(labels[1:], self.lam)


def _cut(lam: float, y: int, x: int, size: int) -> Draw:
    side = int(size * (1 - lam) ** 0.5)
    top, left = max(0, y - side // 2), max(0, x - side // 2)
    bottom, right = min(size, y - side // 2 + side), min(size, x - side // 2 + side)
    return Draw(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))
