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
from util.bounds import POSITIVE, Bound
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
    "kd": Loss(kd, settings={"T": Setting(4.0, POSITIVE, "temperature")}),
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


def _ramp(steps: int) -> torch.Tensor:
    """k / (steps - 1) for k = 0 ... steps - 1; where there is one single step, 1."""
    return torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)


def _first_epoch(after: torch.Tensor) -> torch.Tensor:
    """The schedule `after`, (E, n), with a ramp of its own over the iterations of the first epoch."""
    return torch.cat([_ramp(after.shape[1]).unsqueeze(0), after[1:].double()])


# Schedules of alpha, each a function of the number of epochs E and of iterations per epoch n that gives (E, n) values.
ALPHA_SCHEDULES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "per epoch": lambda epochs, n: _ramp(epochs).unsqueeze(1).expand(epochs, n),
    "per iteration": lambda epochs, n: _ramp(epochs * n).view(epochs, n),
    "each epoch": lambda epochs, n: _ramp(n).expand(epochs, n),
    "first epoch": lambda epochs, n: _first_epoch(torch.ones(epochs, n)),
    "first epoch, then 0.7": lambda epochs, n: _first_epoch(torch.full((epochs, n), 0.7)),
    "first epoch, then per epoch": lambda epochs, n: _first_epoch(ALPHA_SCHEDULES["per epoch"](epochs, n)),
}


def alpha_schedule(alpha: float | str, epochs: int, iterations: int) -> torch.Tensor:
    """The weight of the hard labels at every step: float32 (epochs, iterations per epoch), values in [0, 1].

    alpha: a constant, or a schedule's name, for epochs e of E and iterations i of n in each, counted from 0:
    "per epoch" e / (E - 1); "per iteration" (e n + i) / (E n - 1); "each epoch" i / (n - 1) in every epoch anew;
    "first epoch" i / (n - 1) during the first epoch and 1 after it, or, by its longer names, what they say. Where a
    schedule has one single step, it is 1 there.
    """
    if isinstance(alpha, str):
        return ALPHA_SCHEDULES[alpha](epochs, iterations).float()
    return torch.full((epochs, iterations), float(alpha))
