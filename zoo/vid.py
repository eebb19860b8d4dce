"""VID: variational information distillation, and the regressors that it learns."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from util.bounds import POSITIVE
from util.runtime import UserError
from zoo.declared import Loss, Setting, paired_stages, same_size


class VariationalRegressors(nn.ModuleList):
    """For each stage, what tells the teacher's map from the student's.

    mean: three 1x1 convolutions. scale: (C,), the variances of the teacher's channels before softplus.
    """

    def __init__(self, student: Shapes, teacher: Shapes, init_variance: float, eps: float):
        """Raises UserError for networks with different stages, and for an initial variance below the least."""
        super().__init__()
        if init_variance <= eps:
            raise UserError(f"--init_variance {init_variance} must be above --eps {eps}, the least variance")
        excess = init_variance - eps
        for (narrow, *_), (wide, *_) in paired_stages(student, teacher):
            stage = nn.Module()
            stage.mean = nn.Sequential(
                nn.Conv2d(narrow, wide, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(wide, wide, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(wide, wide, 1, bias=False),
            )
            # softplus of it is the excess; log(exp(excess) - 1), which would overflow.
            stage.scale = nn.Parameter(torch.full((wide,), excess + math.log(-math.expm1(-excess))))
            self.append(stage)


def vid(student: Outputs, teacher: Outputs, labels: torch.Tensor, eps: float, parts: nn.Module, **_) -> torch.Tensor:
    """VID = sum over stages of the mean over all elements of ((t - mu(s))^2 / v + log v) / 2; maps (B, C, H, W).

    Ahn et al., "Variational Information Distillation for Knowledge Transfer" (2019), equations 5 and 6: t is taken as
    normal around mu, three learnt 1x1 convolutions of the student's map s, with a learnt variance for each channel,
    v = log(1 + exp(a)) + eps. Published: v 5 at the start, eps 1e-5; the field's table has weight 1. Maps of different
    sizes are pooled to the smaller. Raises UserError where the networks have different stages.
    """
    total = 0
    for (s, t), stage in zip(paired_stages(student, teacher), parts, strict=True):
        s, t = same_size(s.float(), t.detach().float())
        error = (stage.mean(s).float() - t).square().mean((0, 2, 3))  # of each channel, as its variance is
        variance = F.softplus(stage.scale) + eps
        total = total + (error / variance + variance.log()).mean() / 2
    return total


LOSSES = {
    "vid": Loss(
        vid,
        needs=("stages",),
        settings={
            "init_variance": Setting(5.0, POSITIVE, "the learnt variances at the start"),
            "eps": Setting(1e-5, POSITIVE, "the least that a learnt variance can be"),
        },
        parts=VariationalRegressors,
    ),
}
