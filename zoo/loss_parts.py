"""What losses learn and remember themselves: modules made from the shapes of the student's and the teacher's outputs.

They are trained with the student and kept in the state of an unfinished run, and no part of the student's checkpoint.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from util.runtime import Unsuited, UserError, send


def paired_stages(student: Outputs | Shapes, teacher: Outputs | Shapes) -> list[tuple]:
    """The student's and the teacher's map, or shape, of each stage. Raises Unsuited for different stages."""
    if student.maps.keys() != teacher.maps.keys():
        raise Unsuited(
            f"this loss compares stage by stage, and the student has {len(student.maps)} stages, the teacher "
            f"{len(teacher.maps)}; choose another loss, or networks with as many"
        )
    return [(maps, teacher.maps[name]) for name, maps in student.maps.items()]


def hint_regressor(student: Shapes, teacher: Shapes, stage: int) -> nn.Sequential:
    """From the student's channels at a stage to the teacher's. Raises Unsuited for no such stage."""
    for name, shapes in (("student", student), ("teacher", teacher)):
        if f"stage{stage}" not in shapes.maps:
            raise Unsuited(f"--stage {stage}: the {name} has {len(shapes.maps)} stages only; choose one of them")
    narrow, wide = (shapes.maps[f"stage{stage}"][0] for shapes in (student, teacher))
    return nn.Sequential(nn.Conv2d(narrow, wide, kernel_size=1), BatchNorm(wide), nn.ReLU())


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


class Contrast(nn.Module):
    """Embeddings of both networks' pooled last maps, and those remembered of each training image, M in number.

    bank_student, bank_teacher: (M, dimension), normalised once an image has been seen, random before. labels: (M,), -1
    for an image not seen yet. log_z: (2,), the logarithms of the constants Z of the student's and of the teacher's
    embeddings, infinite before the first batch. drawn: the images among which a batch's negatives are.
    """

    def __init__(self, student: Shapes, teacher: Shapes, dimension: int, negatives: int, **_):
        super().__init__()
        self.embed_student = nn.Linear(student.last_map[0], dimension)
        self.embed_teacher = nn.Linear(teacher.last_map[0], dimension)
        n, bound = student.n_images, math.sqrt(3 / dimension)  # so that their squared norms are 1 on average
        self.register_buffer("bank_student", torch.empty(n, dimension).uniform_(-bound, bound))
        self.register_buffer("bank_teacher", torch.empty(n, dimension).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((n,), -1))
        self.register_buffer("log_z", torch.full((2,), math.inf))
        self.register_buffer("drawn", torch.arange(min(n, negatives)), persistent=False)

    def draw(self) -> None:
        """Draw for a batch, in place, from torch's global generator on the CPU."""
        self.drawn.copy_(send(torch.randperm(len(self.labels))[: len(self.drawn)], self.drawn.device))

    @torch.no_grad()
    def normalise(self, log_z: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> None:
        """Set that element of log_z from its first batch: products (B,) and (B, N), where those left out are -inf."""
        products = torch.cat([positive, negative.flatten()])
        mean = products.logsumexp(0) - products.isfinite().sum().log()
        # Without asking whether it is set, for which the step would wait.
        log_z.copy_(torch.where(log_z.isfinite(), log_z, mean + math.log(len(self.labels))))

    @torch.no_grad()
    def remember(self, index: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, momentum: float) -> None:
        """Bring the banks of these images, (B,), towards their embeddings now, (B, dimension) each."""
        for bank, new in ((self.bank_student, student), (self.bank_teacher, teacher)):
            bank[index] = F.normalize(momentum * bank[index] + (1 - momentum) * new)


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


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a channel has a single value: one image, pooled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
