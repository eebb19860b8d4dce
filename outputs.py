"""What every network gives, and the shapes of it: what losses, teacher and engine know of a network."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

STAGES = ("stage1", "stage2", "stage3", "stage4")  # names of a network's stages, the first ones where it has fewer


class Outputs(NamedTuple):
    """What a network gives for B images; losses take what they need of it.

    logits: float32 (B, classes).
    last_map: the last feature map, before pooling, (B, C, H, W): C is 512 for a ResNet-18, 2048 for a ResNet-50; H = W
        is the image's side / 8 with the stem for small images, / 32 with torchvision's own, rounded up. None for a
        network that has none, as a vision transformer.
    maps: the feature maps at the ends of the stages, (B, C, H, W) each, under the stages' names, "stage1" the first.
    projected: a feature student's last map brought to the teacher's channels, (B, 2048, H, W).
    head: of a teacher, its frozen classifier: a function from a map like last_map to logits.
    prototypes: of a teacher, the weights of its final linear layer, a row for each class, (classes, features); None
        where it ends in another layer.
    index: int64 (B,), which of the training images these are; given with a teacher's outputs.
    """

    logits: torch.Tensor | None = None
    last_map: torch.Tensor | None = None
    maps: Mapping[str, torch.Tensor] = MappingProxyType({})
    projected: torch.Tensor | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    prototypes: torch.Tensor | None = None
    index: torch.Tensor | None = None


class Shapes(NamedTuple):
    """The shapes of a network's outputs for one image, from which a loss makes its learnt parts.

    classes: of the logits. last_map: (C, H, W). maps: (C, H, W) under each stage's name. n_images: how many images it
    is trained on, which Outputs.index counts. projected: (C, H, W) of a feature student. prototypes: (classes,
    features), None for a network that does not end in a linear layer.
    """

    classes: int
    last_map: tuple[int, int, int] | None
    maps: Mapping[str, tuple[int, int, int]]
    n_images: int
    projected: tuple[int, int, int] | None = None
    prototypes: tuple[int, int] | None = None


class PooledClassifier:
    """A network whose last map is pooled, `avgpool`, to one value a channel, and classified by a linear layer, `fc`."""

    avgpool: nn.Module
    fc: nn.Linear

    @property
    def num_classes(self) -> int:
        return self.fc.out_features

    def classify(self, last_map: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of a last feature map.

        In the weights' own precision, float32, whatever the autocast: logits rounded to bfloat16 tie, and a tie is
        settled by the class's number.
        """
        with torch.autocast(last_map.device.type, enabled=False):
            return self.fc(torch.flatten(self.avgpool(last_map.to(self.fc.weight.dtype)), 1))

    def outputs(self, last_map: torch.Tensor, maps: Mapping[str, torch.Tensor]) -> Outputs:
        """What the network gives, from its last map and those of its stages."""
        return Outputs(self.classify(last_map), last_map, maps)
