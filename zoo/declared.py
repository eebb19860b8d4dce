"""What a loss is declared with, and what several of them compute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from util.bounds import YES_OR_NO, Bound
from util.runtime import Unsuited


class Setting(NamedTuple):
    """A number that a loss may be given: its default, what it may be, and its line of help."""

    default: float
    bound: Bound
    words: str


@dataclass(frozen=True)
class Loss:
    """One loss.

    function: (student, teacher, labels, **settings) -> scalar; with learnt parts, parts=the module besides.
    needs: of the teacher's outputs, by the names of Outputs ("logits", "last_map", "prototypes") and of its stages
        ("stage1" ..., or "stages", each of them); or a function (**settings) that gives them. No other is there to be
        looked at, but the teacher's head and the images' index, which always are.
    settings: by name; each is a flag of train_distillation.py as well.
    projects: it looks at the student's projected map, which a feature student has.
    weight: what it is multiplied with unless a recipe says otherwise: the published weight beside a cross-entropy of
        weight 1, where it is far from 1.
    parts: (student's shapes, teacher's shapes, **settings) -> what the loss itself learns and remembers. It is trained
        with the student, kept in the state of an unfinished run, and no part of the student's checkpoint. Its `draw()`,
        where it has one, is called before each step; on a GPU, where a step is a CUDA graph, what changes from step to
        step without being computed on the device must be drawn there, into a buffer.
    compares_images: its value is no mean over the images, each taken by itself. Of several processes each computes it
        of the whole batch, then: of labels, index, both networks' logits, and what it needs or projects, and of no
        other outputs.
    remembers: its parts remember single images, so that it can't be used with mixtures of two, nor by several
        processes, each of which would remember other images.
    reuses: it is for a student whose projected map has the teacher's own classifier, models.ReusingStudent.
    """

    function: Callable[..., torch.Tensor]
    needs: tuple[str, ...] | Callable[..., tuple[str, ...]] = ("logits",)
    settings: dict[str, Setting] = field(default_factory=dict)
    projects: bool = False
    weight: float = 1.0
    parts: Callable[..., nn.Module] | None = None
    compares_images: bool = False
    remembers: bool = False
    reuses: bool = False

    def own(self, settings: dict[str, float]) -> dict[str, float]:
        """Those of the settings that are this loss's."""
        return {name: settings[name] for name in self.settings}

    def needed(self, settings: dict[str, float]) -> tuple[str, ...]:
        """What it needs of the teacher's outputs with these settings."""
        return self.needs(**self.own(settings)) if callable(self.needs) else self.needs


def in_float32(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The loss without autocast, under which a product of matrices is rounded to bfloat16."""

    @functools.wraps(loss)
    def run(student: Outputs, teacher: Outputs, labels: torch.Tensor, **named) -> torch.Tensor:
        with torch.autocast(labels.device.type, enabled=False):
            return loss(student, teacher, labels, **named)

    return run


def logit_loss(
    function: Callable[..., torch.Tensor],
    needs: tuple[str, ...] = ("logits",),
    compares_images: bool = False,
    **settings: Setting,
) -> Loss:
    """The entry of a loss that looks at no feature maps: its own settings, and `standardise`.

    With standardise = 1 the loss is given z-scores in place of the student's and the teacher's logits, each image's
    over its classes: (logits - mean) / standard deviation, that of a sample (divided by classes - 1), as in the
    authors' code. Where they add 1e-7 to it, here it counts as 0.001 at least: logits that are all but equal stay near
    0, with a gradient of ordinary size.

    Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024); the loss's T is then the paper's base
    temperature. Published for CIFAR-100: T 2 (for some pairs 3), and beside a cross-entropy of weight 1 the weight 9,
    which is the recipe's to give: kd at alpha 0.1 has that ratio.
    """

    def of_logits(
        student: Outputs, teacher: Outputs, labels: torch.Tensor, standardise: int = 0, **own: float
    ) -> torch.Tensor:
        if standardise:
            student, teacher = (x._replace(logits=_z_scores(x.logits.float())) for x in (student, teacher))
        return function(student, teacher, labels, **own)

    switch = Setting(0, YES_OR_NO, "z-scores of each image's logits, 1 or 0")
    settings = {**settings, "standardise": switch}
    return Loss(of_logits, needs=needs, settings=settings, compares_images=compares_images)


LEAST_DEVIATION = 1e-3  # of an image's logits, where they are divided by it: a classifier may start with equal ones


def _z_scores(logits: torch.Tensor) -> torch.Tensor:
    """Each image's logits with mean 0 and standard deviation 1 over its classes."""
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / deviation.clamp(min=LEAST_DEVIATION)


def paired_stages(student: Outputs | Shapes, teacher: Outputs | Shapes) -> list[tuple]:
    """The student's and the teacher's map, or shape, of each stage. Raises Unsuited for different stages."""
    if student.maps.keys() != teacher.maps.keys():
        raise Unsuited(
            f"this loss compares stage by stage, and the student has {len(student.maps)} stages, the teacher "
            f"{len(teacher.maps)}; choose another loss, or networks with as many"
        )
    return [(maps, teacher.maps[name]) for name, maps in student.maps.items()]


def pooled(maps: torch.Tensor) -> torch.Tensor:
    """The maps (B, C, H, W) averaged over their positions, in float32: (B, C)."""
    return maps.float().mean((2, 3))


def same_size(*maps: torch.Tensor) -> list[torch.Tensor]:
    """The maps (B, C, H, W), each averaged down to the smallest height and width among them."""
    height, width = (min(x.shape[axis] for x in maps) for axis in (2, 3))
    return [x if x.shape[2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width)) for x in maps]


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a channel has a single value: one image, pooled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
