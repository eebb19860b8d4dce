"""Losses that compare how images lie to each other: sp, rkd, pkt."""

import torch
import torch.nn.functional as F

from outputs import Outputs
from util.bounds import NOT_NEGATIVE
from util.runtime import widest
from zoo.declared import Loss, Setting, in_float32, pooled


@in_float32
def sp(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """SP = 1 / B^2 * squared Frobenius norm of G_s - G_t, with G = A A^T, (B, B), each row divided by its norm.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation" (2019), equations 1 to 4, at the last feature map; A is
    (B, C H W). The published weight is 3000.
    """
    return F.mse_loss(_similarities(student.last_map), _similarities(teacher.last_map.detach()))


def _similarities(maps: torch.Tensor) -> torch.Tensor:
    rows = maps.float().permute(0, 2, 3, 1).flatten(1)  # no copy of maps whose channels stand last in memory
    return F.normalize(rows @ rows.T)


@in_float32
def rkd(
    student: Outputs, teacher: Outputs, labels: torch.Tensor, distance_weight: float, angle_weight: float
) -> torch.Tensor:
    """RKD = distance_weight * mean over i, j of huber(d_ij) + angle_weight * mean over i, j, k of huber(cos_ijk).

    Park et al., "Relational Knowledge Distillation" (2019), equations 3 to 8, on pooled last feature maps x, (B, C):
    d_ij = |x_i - x_j| / its mean over pairs that differ, cos_ijk the cosine of the angle at x_j between x_i and x_k,
    and huber(v) the Huber loss, of threshold 1, of the student's v and the teacher's. Pairs and triples of one image
    with itself count in the means, as in the authors' code. Published: weights 25 and 50.
    """
    d_s, d_t = _distances(pooled(student.last_map)), _distances(pooled(teacher.last_map.detach()))
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * _angle_loss(d_s, d_t)


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Of each pair of rows, divided by the mean of those above 0."""
    x = x.to(widest(x.device))  # in float64, or rounding would set rows apart that are nearly equal
    products = (x - x.mean(0)) @ (x - x.mean(0)).T
    squares = products.diag() + products.diag().unsqueeze(1) - 2 * products
    apart = squares > (1e-12 if x.dtype == torch.float64 else 1e-5) * squares.mean()
    d = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
    mean = d.sum() / apart.sum().clamp(min=1)
    return (d / mean.clamp(min=1e-12)).float()


def _angle_loss(d_s: torch.Tensor, d_t: torch.Tensor) -> torch.Tensor:
    """The mean of huber(cos_ijk) from both networks' distances, its gradient computed with it, a part at a time.

    The graph of all B^3 at once would be most of a step's memory, and its parts stay in the processor's cache.
    """
    d, total, slope = d_s.detach().requires_grad_(), 0, torch.zeros_like(d_s)
    for j in torch.arange(len(d), device=d.device).split(max(1, 2**21 // d.numel())):
        with torch.enable_grad():
            part = F.smooth_l1_loss(_cosines(d, j), _cosines(d_t, j), reduction="sum") / len(d) ** 3
        total, slope = total + part.detach(), slope + torch.autograd.grad(part, d)[0]
    linear = (d_s * slope).sum()
    return total + (linear - linear.detach())


def _cosines(d: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Of the angles at these j between i and k, [j, i, k], from the distances; 0 where i or k is where j is.

    By the law of cosines: the vectors between all pairs of points would be (B, B, C).
    """
    apart = d[j] > 0
    inverse = torch.where(apart, 1 / torch.where(apart, d[j], 1), 0)
    squares = d[j].square()
    sides = squares[:, :, None] + squares[:, None, :] - d.square()
    return sides * (inverse[:, :, None] * inverse[:, None, :]) / 2


@in_float32
def pkt(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """PKT = 1 / B^2 * sum over i, j of t_ij log(t_ij / s_ij), from the pooled last feature maps, (B, C).

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (2018), equations 3 to 6: t
    and s are the teacher's and the student's (1 + cosine of images i and j) / 2, divided by the sum over j. As a mean
    and with 1e-7 added to both probabilities, as in the authors' code. The field's table has weight 30000.
    """
    s, t = (_probabilities(pooled(maps)) for maps in (student.last_map, teacher.last_map.detach()))
    return (t * ((t + 1e-7).log() - (s + 1e-7).log())).mean()


def _probabilities(x: torch.Tensor) -> torch.Tensor:
    x = F.normalize(x)
    likeness = (x @ x.T + 1) / 2
    return likeness / likeness.sum(1, keepdim=True)


LOSSES = {
    "sp": Loss(sp, needs=("last_map",), compares_images=True, weight=3000.0),
    "rkd": Loss(
        rkd,
        needs=("last_map",),
        compares_images=True,
        settings={
            "distance_weight": Setting(25.0, NOT_NEGATIVE, "weight of the distances between images"),
            "angle_weight": Setting(50.0, NOT_NEGATIVE, "weight of the angles between images"),
        },
    ),
    "pkt": Loss(pkt, needs=("last_map",), compares_images=True, weight=30000.0),
}
