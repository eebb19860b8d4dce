"""The losses, one entry each, and the schedules of alpha.

A loss is a function of the student's outputs and the teacher's outputs (outputs.Outputs, for the same B images), the
labels, int64 (B,), and its own settings by name; it gives a scalar in float32, the mean over the images. To add one is
to write the function and its entry in LOSSES, which says what it needs of the teacher, what may be set, and what it
learns: what the teacher computes and remembers, the flags, and the results follow from that.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from recipes import TRAININGS, Recipe
from util import processes
from util.bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, YES_OR_NO, Bound
from util.runtime import Unsuited, UserError, widest
from zoo.loss_parts import Contrast, Review, VariationalRegressors, hint_regressor, paired_stages


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


def cross_entropy(
    student: Outputs,
    labels: torch.Tensor,
    mixed: tuple[torch.Tensor, float] | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """CE, the loss of hard labels: the mean over images of -log softmax(student logits)[label], in nats.

    mixed: of images that are mixtures of two, the other labels and their part p: then (1 - p) CE(labels) +
    p CE(others). smoothing s: labels are (1 - s) of themselves and s of all classes alike; Szegedy et al., "Rethinking
    the Inception Architecture for Computer Vision" (2016), section 7.
    """
    logits = student.logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if mixed is None:
        return loss
    others, part = mixed
    return (1 - part) * loss + part * F.cross_entropy(logits, others, label_smoothing=smoothing)


def kd(student: Outputs, teacher: Outputs, labels: torch.Tensor, T: float) -> torch.Tensor:
    """KD = T^2 / B * sum of p_t (log p_t - log p_s), with p = softmax(logits / T); logits (B, classes).

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2: soft targets at
    temperature T, their gradient scaled by T^2. Here as the Kullback-Leibler divergence, which differs from the paper's
    cross-entropy by the entropy of p_t only and is 0 where student and teacher agree.
    """
    log_p_s = F.log_softmax(student.logits.float() / T, dim=1)
    log_p_t = F.log_softmax(teacher.logits.float() / T, dim=1)
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True) * T**2


MASKED = -1e30  # a logit that has no part: exp of it is 0, and differences of two are finite, as those of -inf are not
LEAST_DEVIATION = 1e-3  # of an image's logits, where they are divided by it: a classifier may start with equal ones


def dkd(student: Outputs, teacher: Outputs, labels: torch.Tensor, T: float, tckd: float, nckd: float) -> torch.Tensor:
    """DKD = T^2 / B * sum over images of tckd KL(b_t || b_s) + nckd KL(q_t || q_s); logits (B, classes).

    b = (p_y, 1 - p_y) with p = softmax(logits / T) and y the label: the target class against all others (TCKD).
    q = softmax(logits / T) over the classes other than y: what is known of these among themselves (NCKD). Of two
    classes the other is one alone, so q = (1) and NCKD is 0.

    Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), section 3; tckd and nckd are its alpha and beta.
    Published for CIFAR-100: T 4, tckd 1, nckd 8, but in the authors' configurations another nckd for some pairs, 2 for
    ResNet-56 to ResNet-20. There the cross-entropy has weight 1 and this loss min(epoch / 20, 1), epochs counted from
    1: a warm-up, which belongs to the recipe and is not part of the loss.
    """
    logits_s, logits_t = student.logits.float() / T, teacher.logits.float() / T
    target = _one_hot(labels, logits_s)
    target_class = _kl(_in_or_out(logits_t, target), _in_or_out(logits_s, target))
    other_classes = _kl(_log_softmax_without(logits_t, target), _log_softmax_without(logits_s, target))
    return (tckd * target_class + nckd * other_classes) * T**2


def dist(
    student: Outputs, teacher: Outputs, labels: torch.Tensor, T: float, inter: float, intra: float
) -> torch.Tensor:
    """DIST = T^2 * (inter * mean over images i of 1 - r(p_s[i, :], p_t[i, :])
                     + intra * mean over classes j of 1 - r(p_s[:, j], p_t[:, j])).

    p = softmax(logits / T), (B, classes); r: Pearson's correlation, of an image's classes, and of a class over the B
    images. To the product of the norms 1e-8 is added, as in the authors' code: what does not vary is uncorrelated. So
    of one image the second part is the constant intra * T^2, without a gradient.

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), section 3; inter and intra are its
    beta and gamma. T^2 comes from the authors' code. Published: inter 2, intra 2, with T 4 for CIFAR-100 and T 1 for
    ImageNet, beside a cross-entropy of weight 1.
    """
    p_s, p_t = F.softmax(student.logits.float() / T, dim=1), F.softmax(teacher.logits.float() / T, dim=1)
    between_classes, within_classes = (1 - _pearson(p_s, p_t, axis).mean() for axis in (1, 0))
    return (inter * between_classes + intra * within_classes) * T**2


def rld(
    student: Outputs,
    teacher: Outputs,
    labels: torch.Tensor,
    T: float,
    T_scd: float,
    scd: float,
    mcd: float,
) -> torch.Tensor:
    """RLD = 1 / B * sum over images of scd T_scd^2 KL(b_t || b_s) + mcd T^2 KL(q_t || q_s); logits (B, classes).

    Sample confidence (SCD): b_t = (p, 1 - p) with p the teacher's highest probability, whichever class has it, and
    b_s the same of the student's probability of the label, both at the temperature T_scd. Masked correlation (MCD):
    q = softmax(logits / T) over the classes that the teacher holds for less likely than the label; where there is at
    most one, it is 0. So a teacher that is wrong says how sure to be, and not of what.

    Sun et al., "Knowledge Distillation with Refined Logits" (ICCV 2025), and the authors' code; scd and mcd are its
    alpha and beta. Published for CIFAR-100: T 4, T_scd 1, scd 1, mcd 8, beside a cross-entropy of weight 1 and with
    the warm-up of dkd, which is not part of the loss.
    """
    logits_s, logits_t = student.logits.float(), teacher.logits.float()
    sure_t = _in_or_out(logits_t / T_scd, _one_hot(logits_t.argmax(1), logits_t))
    sure_s = _in_or_out(logits_s / T_scd, _one_hot(labels, logits_s))
    mask = logits_t >= logits_t.gather(1, labels.unsqueeze(1))
    less_likely = _kl(_log_softmax_without(logits_t / T, mask), _log_softmax_without(logits_s / T, mask))
    return scd * T_scd**2 * _kl(sure_t, sure_s) + mcd * T**2 * less_likely


SINKHORN_STEPS = 10  # of wkd_l, as its authors have it
TINY = 1e-8  # added to what they divide by


@in_float32
def wkd_l(
    student: Outputs, teacher: Outputs, labels: torch.Tensor, T: float, wd: float, kappa: float, eta: float
) -> torch.Tensor:
    """WKD-L = 1 / B * sum over images of -p_t[y] log p_s[y] + wd * W(q_s, q_t); logits (B, classes).

    p = softmax(logits), y the label; q = softmax(logits / T) over the classes other than y. W = sum over classes i, j
    of f_ij c_ij: what it costs to carry the student's q_s over to the teacher's q_t, f being the cheapest way, with an
    entropy of weight eta, as far as ten steps of Sinkhorn's algorithm find it; the gradient goes through them. From
    class to class it is as far as the teacher holds them for unlike: c_ij = 1 - exp(-kappa (1 - cos(w_i, w_j))), with
    w_i the weights of class i in its final linear layer.

    Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation" (NeurIPS 2024),
    and the authors' code, which has this c as one of its choices; that of its CIFAR-100 runs, by a centred kernel
    alignment of two classes' features, takes a pass over the training images. Published for resnet32x4 to resnet8x4: T
    8, wd 600, kappa 1, eta 0.05, beside a cross-entropy of weight 1; there wd falls to 0 over the last 3/8 of the
    epochs, which belongs to a recipe. Of two classes W is 0.
    """
    logits_s, logits_t = student.logits.float(), teacher.logits.float()
    column = labels.unsqueeze(1)
    of_label = F.softmax(logits_t, dim=1).gather(1, column) * F.log_softmax(logits_s, dim=1).gather(1, column)
    others = ~_one_hot(labels, logits_s)
    q_s, q_t = (F.softmax((logits / T).masked_fill(~others, MASKED), dim=1) for logits in (logits_s, logits_t))
    return wd * _transport(q_s, q_t, others, _unlikeness(teacher, kappa), eta).mean() - of_label.mean()


def _unlikeness(teacher: Outputs, kappa: float) -> torch.Tensor:
    """Of each pair of classes, (classes, classes), from 0 to below 1."""
    prototypes = F.normalize(teacher.prototypes.float())
    distances = (1 - prototypes @ prototypes.T).clamp(min=0).fill_diagonal_(0)  # which rounding might leave above 0
    return -torch.expm1(-kappa * distances)


def _transport(
    q_s: torch.Tensor, q_t: torch.Tensor, others: torch.Tensor, cost: torch.Tensor, eta: float
) -> torch.Tensor:
    """What it costs to carry q_s over to q_t, (B, classes) each and 0 but at the others: (B,).

    cost: symmetric, (classes, classes). A class without mass takes no part, so that images with different labels can
    share it.
    """
    kernel = torch.exp(-cost / eta)
    u = others / others.sum(1, keepdim=True)
    for _ in range(SINKHORN_STEPS):
        v = q_t / (u @ kernel + TINY)
        u = q_s / (v @ kernel + TINY)
    return (u @ (kernel * cost) * v).sum(1)


def _kl(log_p_t: torch.Tensor, log_p_s: torch.Tensor) -> torch.Tensor:
    """KL(p_t || p_s), the mean over the images, of logarithms (B, any)."""
    return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def _one_hot(classes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Bool (B, classes): True at each image's class."""
    return classes.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)


def _log_softmax_without(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over the classes that the mask leaves; where it leaves none, that of equal logits."""
    return F.log_softmax(logits.masked_fill(mask, MASKED), dim=1)


def _in_or_out(logits: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
    """(log p, log (1 - p)), (B, 2), of p = softmax(logits) at the class."""
    others = logits.masked_fill(one_hot, MASKED).logsumexp(1, keepdim=True)
    # The logarithm of the odds p / (1 - p): neither is ever found as 1 minus the other, which rounds to 0.
    odds = logits.masked_fill(~one_hot, 0).sum(1, keepdim=True) - others
    return F.logsigmoid(torch.cat([odds, -odds], dim=1))


def _pearson(x: torch.Tensor, y: torch.Tensor, axis: int) -> torch.Tensor:
    """Pearson's correlation of x and y along the axis."""
    x, y = x - x.mean(axis, keepdim=True), y - y.mean(axis, keepdim=True)
    return (x * y).sum(axis) / (x.norm(dim=axis) * y.norm(dim=axis) + 1e-8)


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


def _z_scores(logits: torch.Tensor) -> torch.Tensor:
    """Each image's logits with mean 0 and standard deviation 1 over its classes."""
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / deviation.clamp(min=LEAST_DEVIATION)


def feature_mse(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """MSE = mean over all elements of (projected student map - teacher map)^2; both (B, 2048, H, W).

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), equation 3, with a 1x1 convolution as the regressor, at
    the last feature map, and as a mean, not half a sum. Maps of different sizes are pooled to the smaller.
    """
    return F.mse_loss(*same_size(student.projected.float(), teacher.last_map.detach().float()))


def s2t(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """S2T = CE of teacher.fc(teacher.avgpool(projected student map)) against the labels.

    "Student to teacher": the gradient reaches the student's map through the teacher's classifier, which stays frozen.
    Classifying the student's features with the teacher's own head is the idea of Yang et al., "Knowledge distillation
    via softmax regression representation learning" (2021); there against the teacher's logits, here the labels.
    """
    return F.cross_entropy(teacher.head(student.projected).float(), labels)


def simkd(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """SimKD = mean over all elements of (t(student map) - teacher map)^2, last maps; both (B, C, H, W).

    Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (CVPR 2022), equation 2: t is a learnt 1x1,
    3x3 and 1x1 convolution, each with batch norm and ReLU, the middle one of half the teacher's channels, and part of
    the student from then on, whose logits are those of the teacher's frozen classifier of t(student map):
    models.ReusingStudent. Published without any cross-entropy, so at alpha 0. Maps of different sizes are pooled to the
    smaller; where the student's is the larger, the authors pool it before t, not after.
    """
    return feature_mse(student, teacher, labels)


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


def at(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """AT = sum over stages of the mean over images and positions of (Q_s - Q_t)^2; maps (B, C, H, W).

    Zagoruyko, Komodakis, "Paying More Attention to Attention" (2017), equation 2 with p = 2: Q is an image's map of
    the mean over channels of the squared activations, (H W,), divided by its Euclidean norm. The mean of squares is
    that of the authors' code; the field's table has weight 1000. Maps of different sizes are pooled to the smaller.
    Raises UserError where the networks have different stages.
    """
    pairs = [same_size(s.float(), t.detach().float()) for s, t in paired_stages(student, teacher)]
    return sum(F.mse_loss(_attention(s), _attention(t)) for s, t in pairs)


def _attention(maps: torch.Tensor) -> torch.Tensor:
    return F.normalize(maps.square().mean(1).flatten(1))


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


@in_float32
def crd(
    student: Outputs,
    teacher: Outputs,
    labels: torch.Tensor,
    T: float,
    negatives: int,
    bank_momentum: float,
    parts: Contrast,
    **_,
) -> torch.Tensor:
    """CRD = sum over both networks of the mean over images of -log h(positive) - sum over negatives of log(1 - h).

    Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020), equations 10 to 19: the pooled last
    feature map of each network, embedded linearly in 128 dimensions and normalised, is told, among remembered
    embeddings of the other network, to that of the same image from those of N negatives: h = p / (p + N / M) of M
    images, p = exp(product / T) / Z, Z the mean of the first batch's exp times M. What is remembered follows with
    bank_momentum. Published: N 16384, T 0.07, momentum 0.5, weight 0.8; negatives of other classes. Here a batch draws
    once for all its images, from torch's global generator, and an image's negatives are those drawn of other classes
    than its own, as far as classes have been seen, with their mean times N.
    """
    s = F.normalize(parts.embed_student(pooled(student.last_map)))
    t = F.normalize(parts.embed_teacher(pooled(teacher.last_map.detach())))
    parts.labels[teacher.index] = labels
    other = parts.labels[parts.drawn] != labels.unsqueeze(1)
    log_ratio = math.log(negatives / len(parts.labels))
    total = 0
    for anchor, bank, log_z in ((s, parts.bank_teacher, parts.log_z[0]), (t, parts.bank_student, parts.log_z[1])):
        positive = (anchor * bank[teacher.index]).sum(1) / T
        negative = (anchor @ bank[parts.drawn].T / T).masked_fill(~other, -math.inf)
        parts.normalise(log_z, positive, negative)
        told = -F.logsigmoid(positive - log_z - log_ratio)
        refused = -F.logsigmoid(log_ratio + log_z - negative).sum(1) / other.sum(1).clamp(min=1)
        total = total + (told + negatives * refused).mean()
    parts.remember(teacher.index, s, t, bank_momentum)
    return total


def reviewkd(student: Outputs, teacher: Outputs, labels: torch.Tensor, parts: Review) -> torch.Tensor:
    """ReviewKD = sum over levels of HCL(fused student level, teacher level); levels: all stages' maps, and the pooled.

    Chen et al., "Distilling Knowledge via Knowledge Review" (2021), sections 3.2 and 3.3: from the deepest level up,
    each of the student's is fused with those below it (ABF, loss_parts.Fusion) and brought to the teacher's shape. HCL
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


def pooled(maps: torch.Tensor) -> torch.Tensor:
    """The maps (B, C, H, W) averaged over their positions, in float32: (B, C)."""
    return maps.float().mean((2, 3))


def same_size(*maps: torch.Tensor) -> list[torch.Tensor]:
    """The maps (B, C, H, W), each averaged down to the smallest height and width among them."""
    height, width = (min(x.shape[axis] for x in maps) for axis in (2, 3))
    return [x if x.shape[2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width)) for x in maps]


STAGE = Bound(int, "a stage's number, 1 to 4", lambda x: 1 <= x <= 4)

LOSSES: dict[str, Loss] = {
    "kd": logit_loss(kd, T=Setting(4.0, POSITIVE, "temperature")),
    "dkd": logit_loss(
        dkd,
        T=Setting(4.0, POSITIVE, "temperature"),
        tckd=Setting(1.0, NOT_NEGATIVE, "weight of the target class against the others"),
        nckd=Setting(8.0, NOT_NEGATIVE, "weight of the other classes among themselves"),
    ),
    "dist": logit_loss(
        dist,
        compares_images=True,
        T=Setting(4.0, POSITIVE, "temperature"),
        inter=Setting(2.0, NOT_NEGATIVE, "weight of the correlation over an image's classes"),
        intra=Setting(2.0, NOT_NEGATIVE, "weight of the correlation over a class's images"),
    ),
    "rld": logit_loss(
        rld,
        T=Setting(4.0, POSITIVE, "temperature of the masked correlation"),
        T_scd=Setting(1.0, POSITIVE, "temperature of the sample confidence"),
        scd=Setting(1.0, NOT_NEGATIVE, "weight of the sample confidence"),
        mcd=Setting(8.0, NOT_NEGATIVE, "weight of the masked correlation"),
    ),
    "wkd_l": logit_loss(
        wkd_l,
        needs=("logits", "prototypes"),
        T=Setting(8.0, POSITIVE, "temperature of the classes other than the label"),
        wd=Setting(600.0, NOT_NEGATIVE, "weight of the Wasserstein distance"),
        kappa=Setting(1.0, POSITIVE, "how fast classes grow apart as the teacher's weights of them do"),
        eta=Setting(0.05, POSITIVE, "weight of the transport's entropy"),
    ),
    "mse": Loss(feature_mse, needs=("last_map",), projects=True),
    "s2t": Loss(s2t, needs=(), projects=True),
    "simkd": Loss(simkd, needs=("last_map",), projects=True, reuses=True),
    "fitnet": Loss(
        fitnet,
        needs=lambda stage: (f"stage{stage}",),
        settings={"stage": Setting(2, STAGE, "the stage whose maps are compared")},
        weight=100.0,
        parts=hint_regressor,
    ),
    "at": Loss(at, needs=("stages",), weight=1000.0),
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
    "vid": Loss(
        vid,
        needs=("stages",),
        settings={
            "init_variance": Setting(5.0, POSITIVE, "the learnt variances at the start"),
            "eps": Setting(1e-5, POSITIVE, "the least that a learnt variance can be"),
        },
        parts=VariationalRegressors,
    ),
    "crd": Loss(
        crd,
        needs=("last_map",),
        settings={
            "T": Setting(0.07, POSITIVE, "temperature"),
            "negatives": Setting(16384, COUNT, "negatives for each image"),
            "bank_momentum": Setting(0.5, FRACTION, "what stays of a remembered embedding when a new one comes"),
            "dimension": Setting(128, COUNT, "of the embeddings"),
        },
        weight=0.8,
        parts=Contrast,
        compares_images=True,
        remembers=True,
    ),
    "reviewkd": Loss(reviewkd, needs=("stages", "last_map"), parts=Review),
}


def terms_of(recipe: Recipe) -> dict[str, Loss]:
    """The recipe's terms besides the cross-entropy with the labels, under their names. Raises UserError for no loss."""
    names = [recipe.soft] if recipe.soft else []
    if unknown := [name for name in names if name not in LOSSES]:
        raise UserError(f"{recipe.job}: there is no loss {unknown[0]}; there are {', '.join(LOSSES)}")
    names += ["mse"] * (recipe.beta > 0) + ["s2t"] * (recipe.gamma > 0)
    return {name: LOSSES[name] for name in names}


def weight_of(recipe: Recipe) -> float:
    """The weight of the recipe's soft loss: where the recipe says None, the loss's own."""
    return LOSSES[recipe.soft].weight if recipe.weight is None else recipe.weight


def needs_of(recipe: Recipe) -> frozenset[str]:
    """Which of the teacher's outputs for an image the recipe's terms look at. Raises UserError as settings_of."""
    settings = settings_of(recipe)
    return frozenset(need for loss in terms_of(recipe).values() for need in loss.needed(settings)) - {"prototypes"}


def settings_of(recipe: Recipe) -> dict[str, float]:
    """The settings of the recipe's terms, the recipe's own or else the default.

    Raises UserError for one that no term has, one that is out of bounds, and a term whose projector the network lacks;
    Unsuited for a term that remembers images, where the training mixes them or several processes share them.
    """
    known = {name: setting for loss in terms_of(recipe).values() for name, setting in loss.settings.items()}
    remembers = any(loss.remembers for loss in terms_of(recipe).values())
    if remembers and TRAININGS[recipe.training].mixes:
        raise Unsuited(
            f"{recipe.job}: {recipe.soft} remembers single images, and --training {recipe.training} shows mixtures of "
            "two; take another --training"
        )
    if remembers and processes.size() > 1:
        raise Unsuited(
            f"{recipe.job}: {recipe.soft} remembers single images, and each of {processes.size()} processes sees "
            "others; use one process"
        )
    for name, value in recipe.settings.items():
        if name not in known:
            terms = " and ".join(terms_of(recipe))
            what = f"the loss {terms}" if terms else recipe.job
            has = f"it has {', '.join(known)}" if known else "it has no settings"
            raise UserError(f"--{name}: {what} has no {name}, {has}; leave the flag away")
        try:
            known[name].bound.parse(value)
        except ValueError as error:
            raise UserError(f"--{name}: {error}") from None
    return {name: setting.default for name, setting in known.items()} | dict(recipe.settings)


class Objective(nn.Module):
    """A recipe's loss, alpha CE + (1 - alpha) weight soft + beta MSE + gamma S2T; it learns what its terms learn.

    Where the schedule of alpha is one of SUMS, the weight of CE is 1 instead. student, teacher: the shapes of their
    outputs; None for a recipe without a teacher.
    """

    def __init__(self, recipe: Recipe, student: Shapes | None = None, teacher: Shapes | None = None):
        super().__init__()
        terms, settings = terms_of(recipe), settings_of(recipe)
        self.soft, self.beta, self.gamma = recipe.soft, recipe.beta, recipe.gamma
        self.weight, self.sums = weight_of(recipe), recipe.alpha in SUMS
        self.smoothing = TRAININGS[recipe.training].label_smoothing
        self.terms = {name: (loss, loss.own(settings)) for name, loss in terms.items()}
        if student and teacher:
            _refuse_lacking(terms, settings, student, teacher)
        self.parts = nn.ModuleDict(
            {name: loss.parts(student, teacher, **loss.own(settings)) for name, loss in terms.items() if loss.parts}
        )
        # A feature student has a projector of its own; any other network gets one here.
        self.projector, projects = None, any(loss.projects for loss in terms.values())
        if projects and student and student.projected and student.projected[0] != teacher.last_map[0]:
            there, wanted = student.projected[0], teacher.last_map[0]
            raise UserError(
                f"the student's projector gives {there} channels, the teacher's map has {wanted}; give --student_arch, "
                "and the projector will be made for the pair"
            )
        if projects and student and not student.projected:
            self.projector = nn.Conv2d(student.last_map[0], teacher.last_map[0], kernel_size=1)

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        alpha: torch.Tensor,
        mixed: tuple[torch.Tensor, float] | None = None,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms under their names, each a scalar before its weight, and their weighted sum under "loss".

        alpha: a 0-dim tensor. A term that the recipe does not have is not computed. mixed: see cross_entropy; the other
        terms are told the labels alone, of the images that have the greater part. gather: of several processes, from
        this one's part of a batch, (b, ...), to the whole batch, (B, ...), with gradient.
        """
        hard = cross_entropy(student, labels, mixed, self.smoothing)
        if self.projector:
            student = student._replace(projected=self.projector(student.last_map))
        values = {name: self._term(name, student, teacher, labels, gather) for name in self.terms}
        total = hard if self.sums else alpha * hard
        if self.soft:
            total = total + (1 - alpha) * self.weight * values[self.soft]
        if self.beta:
            total = total + self.beta * values["mse"]
        if self.gamma:
            total = total + self.gamma * values["s2t"]
        return {"loss": total, "ce": hard, **values}

    def _term(
        self,
        name: str,
        student: Outputs,
        teacher: Outputs,
        labels: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        loss, settings = self.terms[name]
        parts = {"parts": self.parts[name]} if name in self.parts else {}
        if gather and loss.compares_images:
            needs = {"logits", "index", *loss.needed(settings)} | ({"projected"} if loss.projects else set())
            student, teacher = (_gathered(outputs, needs, gather) for outputs in (student, teacher))
            labels = gather(labels)
        return loss.function(student, teacher, labels, **settings, **parts)


def _gathered(outputs: Outputs, needs: set[str], gather: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
    """Of the outputs those that are needed, for the whole batch; without the others, which are of a part of it."""
    maps = {name: gather(value) for name, value in outputs.maps.items() if needs & {name, "stages"}}
    whole = {name: getattr(outputs, name) for name in ("logits", "last_map", "projected", "index")}
    for name, value in whole.items():
        whole[name] = gather(value) if name in needs and value is not None else None
    return outputs._replace(maps=maps, **whole)


def _refuse_lacking(terms: dict[str, Loss], settings: dict[str, float], student: Shapes, teacher: Shapes) -> None:
    """Raise Unsuited for a loss of what a network has not: feature maps, as many stages, a classifier's weights."""
    needs = {name: {*loss.needed(settings)} for name, loss in terms.items()}
    of_maps = [name for name, loss in terms.items() if loss.projects or needs[name] - {"logits", "prototypes"}]
    without = [whose for whose, shapes in (("student", student), ("teacher", teacher)) if shapes.last_map is None]
    if of_maps and without:
        raise Unsuited(
            f"the loss {of_maps[0]} compares feature maps, and the {without[0]} has none; choose a loss of logits"
        )
    if any("stages" in names for names in needs.values()):
        paired_stages(student, teacher)
    if reusing := [name for name, loss in terms.items() if loss.reuses and not student.projected]:
        raise Unsuited(f"the loss {reusing[0]} is for a student that has the teacher's classifier")
    of_classes = [name for name, names in needs.items() if "prototypes" in names]
    if of_classes and teacher.prototypes is None:
        raise Unsuited(
            f"the loss {of_classes[0]} compares classes by the teacher's final linear layer, and this teacher ends in "
            "another; choose another loss"
        )


Schedule = Callable[[int, int], torch.Tensor]


def _ramp(steps: int) -> torch.Tensor:
    """k / (steps - 1) for k = 0 ... steps - 1; where there is one single step, 1."""
    return torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)


def _first_epoch(after: torch.Tensor) -> torch.Tensor:
    """The schedule `after`, (E, n), with a ramp of its own over the iterations of the first epoch."""
    return torch.cat([_ramp(after.shape[1]).unsqueeze(0), after[1:].double()])


def _descending(schedule: Schedule) -> Schedule:
    return lambda epochs, n: 1 - schedule(epochs, n).double()


# Schedules of alpha, each a function of the number of epochs E and of iterations per epoch n that gives (E, n) values.
ALPHA_SCHEDULES: dict[str, Schedule] = {
    "per epoch": lambda epochs, n: _ramp(epochs).unsqueeze(1).expand(epochs, n),
    "per iteration": lambda epochs, n: _ramp(epochs * n).view(epochs, n),
    "each epoch": lambda epochs, n: _ramp(n).expand(epochs, n),
    "first epoch": lambda epochs, n: _first_epoch(torch.ones(epochs, n)),
    "first epoch, then 0.7": lambda epochs, n: _first_epoch(torch.full((epochs, n), 0.7)),
    "first epoch, then per epoch": lambda epochs, n: _first_epoch(ALPHA_SCHEDULES["per epoch"](epochs, n)),
    "cosine": lambda epochs, n: (1 - torch.cos(torch.pi * _ramp(epochs * n).view(epochs, n))) / 2,
}
ALPHA_SCHEDULES |= {f"{name}, descending": _descending(schedule) for name, schedule in ALPHA_SCHEDULES.items()}

# CE + (1 - alpha) weight soft, CE with the weight 1: how most papers add their loss.
SUMS: dict[str, Schedule] = {
    "sum": lambda epochs, n: torch.zeros(epochs, n),
    "sum, warm-up": lambda epochs, n: 1 - _warm_up(epochs).unsqueeze(1).expand(epochs, n),
}
ALPHA_SCHEDULES |= SUMS


def _warm_up(epochs: int) -> torch.Tensor:
    """min((e + 1) / (E / 12), 1): over the first 20 epochs of the field's 240."""
    return (torch.arange(1, epochs + 1) / max(1, epochs / 12)).clamp(max=1)


def alpha_schedule(alpha: float | str, epochs: int, iterations: int) -> torch.Tensor:
    """The weight of the hard labels at every step: float32 (epochs, iterations per epoch), values in [0, 1].

    alpha: a constant, or a schedule's name, for epochs e of E and iterations i of n in each, counted from 0:
    "per epoch" e / (E - 1); "per iteration" k / (E n - 1), with k = e n + i; "each epoch" i / (n - 1) in every epoch
    anew; "first epoch" i / (n - 1) during the first epoch and 1 after it, or, by its longer names, what they say;
    "cosine" (1 - cos(pi k / (E n - 1))) / 2. Where a schedule has one single step, it is 1 there. Each is there as
    "<name>, descending" as well, which is 1 minus it: the hard labels first. Of SUMS, where the hard labels weigh 1, it
    is 1 minus the share of the soft loss: 0 in "sum"; in "sum, warm-up" that share grows by equal parts in the first
    twelfth of the epochs.
    """
    if isinstance(alpha, str):
        return ALPHA_SCHEDULES[alpha](epochs, iterations).float()
    return torch.full((epochs, iterations), float(alpha))
