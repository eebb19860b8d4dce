"""The losses of the thirteen experiments, the schedules of alpha, and the objective; LOSSES has those of zoo/ as well.

A loss is a function of the student's outputs and the teacher's outputs (outputs.Outputs, for the same B images), the
labels, int64 (B,), and its own settings by name; it gives a scalar in float32, the mean over the images. To add one is
to write the function and its entry in LOSSES, which says what it needs of the teacher, what may be set, and what it
learns: what the teacher computes and remembers, the flags, and the results follow from that.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from outputs import Outputs, Shapes
from recipes import TRAININGS, Recipe
from util import processes
from util.bounds import POSITIVE
from util.runtime import Unsuited, UserError
from zoo import at, crd, fitnet, logit_losses, relations, reviewkd, vid
from zoo.declared import Loss, Setting, logit_loss, paired_stages, same_size


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


LOSSES: dict[str, Loss] = {
    "kd": logit_loss(kd, T=Setting(4.0, POSITIVE, "temperature")),
    "mse": Loss(feature_mse, needs=("last_map",), projects=True),
    "s2t": Loss(s2t, needs=(), projects=True),
    "simkd": Loss(simkd, needs=("last_map",), projects=True, reuses=True),
    **logit_losses.LOSSES,
    **fitnet.LOSSES,
    **at.LOSSES,
    **relations.LOSSES,
    **vid.LOSSES,
    **crd.LOSSES,
    **reviewkd.LOSSES,
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
