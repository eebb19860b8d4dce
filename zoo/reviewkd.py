"""ReviewKD: fused levels of the student against the teacher's, and the fusions that it learns."""

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from zoo.declared import BatchNorm, Loss, paired_stages, pooled


class Fusion(nn.Module):
    """ABF, attention based fusion: a level of the student, weighed against what was fused from the deeper ones.

    Gives the level in the teacher's shape, (B, C_t, H_t, W_t), and what is fused on, (B, mid, H_t, W_t).
    """

    def __init__(self, student: int, mid: int, teacher: int, fuses: bool):
        """Channels of the student's level, in between, and of the teacher's. fuses: there are deeper levels."""
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student, mid, 1, bias=False), BatchNorm(mid))
        self.widen = nn.Sequential(nn.Conv2d(mid, teacher, 3, padding=1, bias=False), BatchNorm(teacher))
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuses else None
        for conv in (self.narrow[0], self.widen[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(
        self, level: torch.Tensor, deeper: torch.Tensor | None, size: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.narrow(level)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([x, deeper], dim=1)).sigmoid()
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.widen(x), x


class Review(nn.Module):
    """The fusions of ReviewKD, one for each stage and one for the pooled map, from the first stage on.

    Called with the student's levels, (B, C, H, W) each, and the teacher's (H, W), it gives the levels in the teacher's
    shapes. Raises UserError for networks with different stages.
    """

    def __init__(self, student: Shapes, teacher: Shapes):
        super().__init__()
        channels = [(s[0], t[0]) for s, t in paired_stages(student, teacher)]
        channels.append((student.last_map[0], teacher.last_map[0]))
        mid, deepest = min(512, student.last_map[0]), len(channels) - 1
        self.fusions = nn.ModuleList(Fusion(s, mid, t, i < deepest) for i, (s, t) in enumerate(channels))

    def forward(self, levels: list[torch.Tensor], sizes: list[torch.Size]) -> list[torch.Tensor]:
        results, deeper = [], None
        for fusion, level, size in reversed(list(zip(self.fusions, levels, sizes, strict=True))):
            result, deeper = fusion(level, deeper, size)
            results.insert(0, result)
        return results


def reviewkd(student: Outputs, teacher: Outputs, labels: torch.Tensor, parts: Review) -> torch.Tensor:
    """ReviewKD = sum over levels of HCL(fused student level, teacher level); levels: all stages' maps, and the pooled.

    Chen et al., "Distilling Knowledge via Knowledge Review" (2021), sections 3.2 and 3.3: from the deepest level up,
    each of the student's is fused with those below it (ABF, Fusion) and brought to the teacher's shape. HCL
    is the mean of the mean squared errors of the maps (weight 1) and of both averaged down to 4x4, 2x2 and 1x1 (1/2,
    1/4, 1/8), where a map is larger. Published for CIFAR with weight 0.6 (resnet56 to resnet20) to 8, reached over 20
    epochs, and the teacher's maps before their last ReLU; here they come after it. Raises UserError where the networks
    have different stages.
    """
    pairs = paired_stages(student, teacher) + [
        [pooled(outputs.last_map)[:, :, None, None] for outputs in (student, teacher)]
    ]
    fused = parts([s.float() for s, _ in pairs], [t.shape[2:] for _, t in pairs])
    return sum(_hcl(s.float(), t.detach().float()) for s, (_, t) in zip(fused, pairs, strict=True))


def _hcl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    total, weights, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.mse_loss(*(F.adaptive_avg_pool2d(maps, side) for maps in (student, teacher)))
    return total / weights


LOSSES = {
    "reviewkd": Loss(reviewkd, needs=("stages", "last_map"), parts=Review),
}
