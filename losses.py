"""The losses and the schedules of alpha, as pure functions.

A loss takes the student's outputs, the teacher's outputs (models.Outputs, for the same B images) and the labels, int64
(B,), and gives a scalar in float32, the mean over the images. To add one is to write a function and put its name into
SOFT (a loss that (1 - alpha) weighs).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models import Outputs
from recipes import Recipe


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
    the last feature map, and as a mean, not half a sum.
    """
    return F.mse_loss(student.projected.float(), teacher.layer4.float())


def s2t(student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
    """S2T = CE of teacher.fc(teacher.avgpool(projected student map)) against the labels.

    "Student to teacher": the gradient reaches the student's map through the teacher's classifier, which stays frozen.
    Classifying the student's features with the teacher's own head is the idea of Yang et al., "Knowledge distillation
    via softmax regression representation learning" (2021); there against the teacher's logits, here the labels.
    """
    return F.cross_entropy(teacher.head(student.projected).float(), labels)


SOFT: dict[str, Callable[..., torch.Tensor]] = {"kd": kd, "mse": feature_mse}


def objective(recipe: Recipe) -> Callable[..., dict[str, torch.Tensor]]:
    """The recipe's loss: a function of (student outputs, teacher outputs or None, labels, alpha as a 0-dim tensor).

    It gives the terms under their names, each a scalar before its weight, and their weighted sum under "loss":
        alpha CE + (1 - alpha) soft + beta MSE + gamma S2T
    A term that the recipe does not have is not computed.
    """
    temperature = {} if recipe.T is None else {"T": recipe.T}

    def loss(student: Outputs, teacher: Outputs | None, labels: torch.Tensor, alpha: torch.Tensor) -> dict:
        terms = {"ce": cross_entropy(student, labels)}
        if not recipe.distils:
            return {"loss": terms["ce"], **terms}
        terms[recipe.soft] = SOFT[recipe.soft](student, teacher, labels, **temperature)
        total = alpha * terms["ce"] + (1 - alpha) * terms[recipe.soft]
        if recipe.beta:
            terms["mse"] = feature_mse(student, teacher, labels)
            total = total + recipe.beta * terms["mse"]
        if recipe.gamma:
            terms["s2t"] = s2t(student, teacher, labels)
            total = total + recipe.gamma * terms["s2t"]
        return {"loss": total, **terms}

    return loss


def _ramp(steps: int) -> torch.Tensor:
    """k / (steps - 1) for k = 0 ... steps - 1; where there is one single step, 1."""
    return torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64)


# Schedules of alpha, each a function of the number of epochs E and of iterations per epoch n that gives (E, n) values.
ALPHA_SCHEDULES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "per epoch": lambda epochs, n: _ramp(epochs).unsqueeze(1).expand(epochs, n),
    "per iteration": lambda epochs, n: _ramp(epochs * n).view(epochs, n),
    "first epoch": lambda epochs, n: _first_epoch(torch.ones(epochs, n)),
    "first epoch, then 0.7": lambda epochs, n: _first_epoch(torch.full((epochs, n), 0.7)),
    "first epoch, then per epoch": lambda epochs, n: _first_epoch(ALPHA_SCHEDULES["per epoch"](epochs, n)),
    "each epoch": lambda epochs, n: _ramp(n).expand(epochs, n),
}


def _first_epoch(after: torch.Tensor) -> torch.Tensor:
    """The schedule `after`, (E, n), with a ramp of its own over the iterations of the first epoch."""
    return torch.cat([_ramp(after.shape[1]).unsqueeze(0), after[1:].double()])


def alpha_schedule(alpha: float | str, epochs: int, iterations: int) -> torch.Tensor:
    """The weight of the hard labels at every step: float32 (epochs, iterations per epoch), values in [0, 1].

    alpha: a constant, or a schedule's name: "per epoch" e / (E - 1); "per iteration" i / (E n - 1), i counted over the
    whole run; "first epoch" i / (n - 1) during the first epoch, 1 after it, or, by its longer names, what they say;
    "each epoch" i / (n - 1) in every epoch anew. One single step means 1.
    """
    if isinstance(alpha, str):
        return ALPHA_SCHEDULES[alpha](epochs, iterations).float()
    return torch.full((epochs, iterations), float(alpha))
