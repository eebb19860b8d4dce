"""FitNet: a hint from a middle stage."""

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from util.bounds import Bound
from util.runtime import Unsuited
from zoo.declared import BatchNorm, Loss, Setting, same_size

STAGE = Bound(int, "a stage's number, 1 to 4", lambda x: 1 <= x <= 4)


def hint_regressor(student: Shapes, teacher: Shapes, stage: int) -> nn.Sequential:
    """From the student's channels at a stage to the teacher's. Raises Unsuited for no such stage."""
    for name, shapes in (("student", student), ("teacher", teacher)):
        if f"stage{stage}" not in shapes.maps:
            raise Unsuited(f"--stage {stage}: the {name} has {len(shapes.maps)} stages only; choose one of them")
    narrow, wide = (shapes.maps[f"stage{stage}"][0] for shapes in (student, teacher))
    return nn.Sequential(nn.Conv2d(narrow, wide, kernel_size=1), BatchNorm(wide), nn.ReLU())


def fitnet(student: Outputs, teacher: Outputs, labels: torch.Tensor, stage: int, parts: nn.Module) -> torch.Tensor:
    """FitNet = mean over all elements of (r(student map) - teacher map)^2, both at one stage; maps (B, C, H, W).

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), equation 3: a hint from a middle stage, r a learnt
    regressor, here as in the field's table a 1x1 convolution, batch norm and ReLU (without these the published weight
    diverges); as a mean, as the field computes it. The field's table has stage 2 and weight 100. Maps of different
    sizes are pooled to the smaller.
    """
    name = f"stage{stage}"
    small, hint = same_size(student.maps[name].float(), teacher.maps[name].detach().float())
    return F.mse_loss(parts(small).float(), hint)


LOSSES = {
    "fitnet": Loss(
        fitnet,
        needs=lambda stage: (f"stage{stage}",),
        settings={"stage": Setting(2, STAGE, "the stage whose maps are compared")},
        weight=100.0,
        parts=hint_regressor,
    ),
}
