"""The losses, one entry each, and the schedules of alpha.

A loss is a function of the student's outputs and the teacher's outputs (models.Outputs, for the same B images), the
labels, int64 (B,), and its own settings by name; it gives a scalar in float32, the mean over the images. To add one is
to write the function and its entry in LOSSES, which says what it needs of the teacher, what may be set, and what it
learns: what the teacher computes and remembers, the flags, and the results follow from that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import Outputs, Shapes
from recipes import Recipe
from util.bounds import NOT_NEGATIVE, POSITIVE, YES_OR_NO, Bound
from util.runtime import UserError


class Setting(NamedTuple):
    """A number that a loss may be given: its default, what it may be, and its line of help."""

    default: float
    bound: Bound
    words: str


@dataclass(frozen=True)
class Loss:
    """One loss.

    function: (student, teacher, labels, **settings) -> scalar; with learnt parts, parts=the module besides.
    needs: of the teacher's outputs, by the names of Outputs ("logits", "last_map") and of its stages ("stage1" ...).
        No other is there to be looked at. The teacher's head and the images' index always are.
    settings: by name; each is a flag of train_distillation.py as well.
    projects: it looks at the student's projected map, which a feature student has.
    parts: makes what the loss itself learns, from the student's and the teacher's shapes. It is trained with the
        student, kept in the state of an unfinished run, and no part of the student's checkpoint.
    """

    function: Callable[..., torch.Tensor]
    needs: tuple[str, ...] = ("logits",)
    settings: dict[str, Setting] = field(default_factory=dict)
    projects: bool = False
    parts: Callable[[Shapes, Shapes], nn.Module] | None = None


def cross_entropy(student: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """CE, the loss of hard labels: the mean over images of -log softmax(student logits)[label], in nats."""
    return F.cross_entropy(student.logits.float(), labels)


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


def logit_loss(function: Callable[..., torch.Tensor], **settings: Setting) -> Loss:
    """The entry of a loss that looks at the logits alone: its own settings, and `standardise`.

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
    return Loss(of_logits, settings={**settings, "standardise": switch})


def _z_scores(logits: torch.Tensor) -> torch.Tensor:
    """Each image's logits with mean 0 and standard deviation 1 over its classes."""
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / deviation.clamp(min=LEAST_DEVIATION)


def feature_mse(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """MSE = mean over all elements of (projected student map - teacher map)^2; both (B, 2048, H, W).

    Romero et al., "FitNets: Hints for Thin Deep Nets" (2015), equation 3, with a 1x1 convolution as the regressor, at
    the last feature map, and as a mean, not half a sum. Maps of different sizes are pooled to the smaller.
    """
    return F.mse_loss(*same_size(student.projected.float(), teacher.last_map.float()))


def s2t(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """S2T = CE of teacher.fc(teacher.avgpool(projected student map)) against the labels.

    "Student to teacher": the gradient reaches the student's map through the teacher's classifier, which stays frozen.
    Classifying the student's features with the teacher's own head is the idea of Yang et al., "Knowledge distillation
    via softmax regression representation learning" (2021); there against the teacher's logits, here the labels.
    """
    return F.cross_entropy(teacher.head(student.projected).float(), labels)


def same_size(*maps: torch.Tensor) -> list[torch.Tensor]:
    """The maps (B, C, H, W), each averaged down to the smallest height and width among them."""
    height, width = (min(x.shape[axis] for x in maps) for axis in (2, 3))
    return [x if x.shape[2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width)) for x in maps]


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
    "mse": Loss(feature_mse, needs=("last_map",), projects=True),
    "s2t": Loss(s2t, needs=(), projects=True),
}


def terms_of(recipe: Recipe) -> dict[str, Loss]:
    """The recipe's terms besides the cross-entropy with the labels, under their names. Raises UserError for no loss."""
    names = [recipe.soft] if recipe.soft else []
    if unknown := [name for name in names if name not in LOSSES]:
        raise UserError(f"{recipe.job}: there is no loss {unknown[0]}; there are {', '.join(LOSSES)}")
    names += ["mse"] * (recipe.beta > 0) + ["s2t"] * (recipe.gamma > 0)
    return {name: LOSSES[name] for name in names}


def needs_of(recipe: Recipe) -> frozenset[str]:
    """Which of the teacher's outputs the recipe's terms look at."""
    return frozenset(need for loss in terms_of(recipe).values() for need in loss.needs)


def settings_of(recipe: Recipe) -> dict[str, float]:
    """The settings of the recipe's terms, the recipe's own or else the default.

    Raises UserError for one that no term has, one that is out of bounds, and a term whose projector the network lacks.
    """
    known = {name: setting for loss in terms_of(recipe).values() for name, setting in loss.settings.items()}
    for name, value in recipe.settings.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has no settings"
            raise UserError(f"--{name}: the loss of {recipe.job} has no {name}, {has}; leave the flag away")
        try:
            known[name].bound.parse(value)
        except ValueError as error:
            raise UserError(f"--{name}: {error}") from None
    return {name: setting.default for name, setting in known.items()} | dict(recipe.settings)


class Objective(nn.Module):
    """A recipe's loss, alpha CE + (1 - alpha) soft + beta MSE + gamma S2T; its parameters are what its terms learn.

    student, teacher: the shapes of their outputs; None for a recipe without a teacher.
    """

    def __init__(self, recipe: Recipe, student: Shapes | None = None, teacher: Shapes | None = None):
        super().__init__()
        terms, settings = terms_of(recipe), settings_of(recipe)
        self.soft, self.beta, self.gamma = recipe.soft, recipe.beta, recipe.gamma
        self.parts = nn.ModuleDict({name: loss.parts(student, teacher) for name, loss in terms.items() if loss.parts})
        self.terms = {
            name: (loss.function, {key: settings[key] for key in loss.settings}) for name, loss in terms.items()
        }

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: torch.Tensor, alpha: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms under their names, each a scalar before its weight, and their weighted sum under "loss".

        alpha: a 0-dim tensor. A term that the recipe does not have is not computed.
        """
        hard = cross_entropy(student, labels)
        values = {name: self._term(name, student, teacher, labels) for name in self.terms}
        total = alpha * hard
        if self.soft:
            total = total + (1 - alpha) * values[self.soft]
        if self.beta:
            total = total + self.beta * values["mse"]
        if self.gamma:
            total = total + self.gamma * values["s2t"]
        return {"loss": total, "ce": hard, **values}

    def _term(self, name: str, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        function, settings = self.terms[name]
        parts = {"parts": self.parts[name]} if name in self.parts else {}
        return function(student, teacher, labels, **settings, **parts)


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


def alpha_schedule(alpha: float | str, epochs: int, iterations: int) -> torch.Tensor:
    """The weight of the hard labels at every step: float32 (epochs, iterations per epoch), values in [0, 1].

    alpha: a constant, or a schedule's name, for epochs e of E and iterations i of n in each, counted from 0:
    "per epoch" e / (E - 1); "per iteration" k / (E n - 1), with k = e n + i; "each epoch" i / (n - 1) in every epoch
    anew; "first epoch" i / (n - 1) during the first epoch and 1 after it, or, by its longer names, what they say;
    "cosine" (1 - cos(pi k / (E n - 1))) / 2. Where a schedule has one single step, it is 1 there. Each is there as
    "<name>, descending" as well, which is 1 minus it: the hard labels first.
    """
    if isinstance(alpha, str):
        return ALPHA_SCHEDULES[alpha](epochs, iterations).float()
    return torch.full((epochs, iterations), float(alpha))
