"""The suites that reproduce.py --suite trains: runs that make one table together, as data."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from losses import LOSSES
from recipes import RECIPES, Claim, Recipe


@dataclass(frozen=True)
class Suite:
    """Runs of one pair of networks and one training, by short names; the student alone and kd come first.

    teacher, student: names of networks that models.build knows, training: a name in TRAININGS; where they are None,
    the flags tell.
    """

    words: str
    runs: dict[str, Recipe]
    teacher: str | None = None
    student: str | None = None
    training: str | None = None


# CIFAR-100, resnet56 to resnet20. Tian et al. measured all of their table 1 with one training; each later paper
# measured its own, and by other rules: Tian gives the last epoch's accuracy (HobbitLong/RepDistiller, issue 16), Zhao
# the best epoch's (megvii-research/mdistiller, issue 30), and of Chen's code the best is what is left in the end.
CRD_PAPER = "Tian et al. 2020, table 1"
CLAIMS = {
    "teacher": Claim(72.34, CRD_PAPER),
    "student": Claim(69.06, CRD_PAPER),
    "kd": Claim(70.66, CRD_PAPER),
    "fitnet": Claim(69.21, CRD_PAPER),
    "at": Claim(70.55, CRD_PAPER),
    "sp": Claim(69.67, CRD_PAPER),
    "rkd": Claim(69.61, CRD_PAPER),
    "pkt": Claim(70.34, CRD_PAPER),
    "vid": Claim(70.38, CRD_PAPER),
    "crd": Claim(71.16, CRD_PAPER),
    "reviewkd": Claim(71.89, "Chen et al. 2021", best=True),
    "dkd": Claim(71.97, "Zhao et al. 2022", best=True),
    "dist": Claim(71.78, "Wang et al. 2023, KD++"),
    "rld": Claim(72.00, "Sun et al. 2025, as others quote it"),
}

# Where that is not CE and the loss added up: 0.1 CE + 0.9 KD, no CE at all, or a loss that grows over the first twelfth
# of the epochs.
PUBLISHED_ALPHA = {"kd": 0.1, "simkd": 0.0} | dict.fromkeys(("dkd", "rld", "reviewkd"), "sum, warm-up")

# What the authors' code has for resnet56 to resnet20, where that is not the loss's default: DKD's beta, and ReviewKD's
# weight of the whole loss.
FOR_THIS_PAIR = {"dkd": {"settings": {"nckd": 2.0}}, "reviewkd": {"weight": 0.6}}

SCHEDULES = (0.7, "per epoch", "per iteration", "first epoch", "cosine", "per epoch, descending")
SCHEDULED = ("kd", "dkd", "mse")


def published(loss: str, **own) -> Recipe:
    """The student distilled by the loss at its published weight beside the cross-entropy's."""
    return _distilled(loss, PUBLISHED_ALPHA.get(loss, "sum"), **own)


def _distilled(loss: str, alpha: float | str, **own) -> Recipe:
    network = "feature_student" if LOSSES[loss].projects else "student"
    return replace(RECIPES["student"], network=network, soft=loss, alpha=alpha, **{"weight": None, **own})


def _by_loss(losses: Iterable[str], own: dict[str, dict]) -> dict[str, Recipe]:
    kd_first = sorted(losses, key=lambda loss: loss != "kd")
    return {"student": RECIPES["student"]} | {loss: published(loss, **own.get(loss, {})) for loss in kd_first}


def _by_schedule() -> dict[str, Recipe]:
    runs = {(loss, alpha): _distilled(loss, alpha) for loss in SCHEDULED for alpha in SCHEDULES}
    return {"student": RECIPES["student"]} | {_name(*key): recipe for key, recipe in runs.items()}


def _name(*parts: str | float) -> str:
    return "_".join(re.sub(r"[^\w.]+", "_", str(part)) for part in parts)


SUITES = {
    "benchmark": Suite(
        "the field's table for CIFAR-100, resnet56 to resnet20",
        _by_loss([loss for loss in LOSSES if loss in CLAIMS], FOR_THIS_PAIR),
        teacher="resnet56", student="resnet20", training="benchmark",
    ),
    "losses": Suite("every loss at its published weight", _by_loss(LOSSES, {})),
    "schedules": Suite(f"{', '.join(SCHEDULED)} by {len(SCHEDULES)} schedules of alpha", _by_schedule()),
}  # fmt: skip


def label(name: str, networks: Iterable[str | None], training: str) -> str:
    """What the suite's results are told by: its name and, where they are not its own, its networks and training."""
    suite = SUITES[name]
    parts = [name, *(network for network in networks if network and network not in (suite.teacher, suite.student))]
    if training not in (suite.training, "reference"):
        parts.append(training)
    return _name(*parts)


def teacher_of(teacher: Recipe, name: str, label: str) -> Recipe:
    """The teacher's recipe as the suite's own, with what is claimed of it."""
    return replace(teacher, suite=label, claimed=_claim(name, "teacher"))


def run_of(recipe: Recipe, name: str, run: str, label: str) -> Recipe:
    """The suite's run of that short name, its networks being the flags' already: under a name made from what it is."""
    job = f"{name}_{run}{label.removeprefix(name)}"
    return replace(recipe, job=job, checkpoint=job, reference=None, suite=label, claimed=_claim(name, run))


def _claim(name: str, run: str) -> Claim | None:
    return CLAIMS.get(run) if name == "benchmark" else None
