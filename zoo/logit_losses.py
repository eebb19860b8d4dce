"""Losses of the logits: dkd, dist, rld, wkd_l."""

import torch
import torch.nn.functional as F

from outputs import Outputs
from util.bounds import NOT_NEGATIVE, POSITIVE
from zoo.declared import Setting, in_float32, logit_loss

MASKED = -1e30  # a logit that has no part: exp of it is 0, and differences of two are finite, as those of -inf are not


SINKHORN_STEPS = 10  # of wkd_l, as its authors have it


TINY = 1e-8  # added to what they divide by


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


LOSSES = {
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
}
