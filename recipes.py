"""The thirteen experiments as data: one row each, nothing else. To add an experiment is to add a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from util.bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, Bound

EPOCHS = Bound(int, "a whole number from 1 to 100000", lambda x: 1 <= x <= 100_000)


class Reference(NamedTuple):
    """Figures on the CIFAR-100 test set, one run: top-1 and top-5 in percent, Test Loss as `test.py` prints it."""

    top1: float
    top5: float
    test_loss: float


def _flag(bound: Bound, words: str | None = None, **default) -> Any:
    """A field that a flag of its name overrides for one run: what it may be, and its line of help."""
    return field(metadata={"bound": bound, "help": words}, **default)


@dataclass(frozen=True)
class Recipe:
    """One experiment: the network trained and its loss, alpha CE + (1 - alpha) soft + beta MSE + gamma S2T.

    network: a name in models.NETWORKS: "teacher", "student", "feature_student".
    arch: of another network in its place, by a name that models.build knows; None for the row's own.
    soft: name of the distillation loss in losses.LOSSES that (1 - alpha) weighs; None for hard labels only.
    alpha: the weight of the hard labels, a number or the name of a schedule in losses.ALPHA_SCHEDULES.
    settings: of the losses, where they are not the losses' own defaults, like {"T": 2.0}, the temperature of KD.
    reference: figures to compare with, where there are any.
    """

    job: str
    checkpoint: str
    network: str
    epochs: int = _flag(EPOCHS)
    scheduler_step: int = _flag(COUNT, "learning rate x0.1 every so many epochs")
    reference: Reference | None = None
    soft: str | None = None
    alpha: float | str = _flag(FRACTION, "weight of the hard labels, where it is not scheduled", default=1.0)
    settings: Mapping[str, float] = field(default_factory=dict)
    beta: float = _flag(NOT_NEGATIVE, "weight of the feature MSE (rows with a projector)", default=0.0)
    gamma: float = _flag(NOT_NEGATIVE, "weight of student to teacher, S2T (rows with a projector)", default=0.0)
    learning_rate: float = _flag(POSITIVE, default=0.001)
    batch_size: int = _flag(COUNT, default=256)
    arch: str | None = None

    @property
    def built(self) -> str:
        """The name by which models.build knows its network."""
        return self.arch or self.network

    @property
    def distils(self) -> bool:
        """True for the rows that need a teacher."""
        return self.soft is not None or self.beta > 0 or self.gamma > 0


def described(recipe: Recipe) -> dict[str, Any]:
    """All that the recipe is but its reference, plain values under their names, the losses' settings among them."""
    values = {part.name: getattr(recipe, part.name) for part in fields(Recipe)}
    del values["reference"]
    return values.pop("settings") | values


# fmt: off
ROWS = [
    Recipe("teacher", "resnet50", "teacher", 100, 25, Reference(69.87, 91.17, 0.00748289)),
    Recipe("student", "resnet18", "student", 50, 20, Reference(59.22, 84.59, 0.00915756)),

    # logits: alpha CE + (1 - alpha) KD
    Recipe("distillation", "Distilled_resnet18", "student", 50, 20,
           Reference(60.15, 85.35, 0.01049371), soft="kd", alpha=0.7, settings={"T": 2.0}),
    Recipe("distillation_KMJ2", "Distilled_resnet18_KMJ2", "student", 50, 20,
           Reference(60.37, 85.53, 0.01071865), soft="kd", alpha="per iteration", settings={"T": 2.0}),
    Recipe("distillation_KMJ1", "Distilled_resnet18_KMJ1", "student", 60, 20,
           Reference(60.41, 85.50, 0.01063989), soft="kd", alpha="per epoch", settings={"T": 2.0}),
    Recipe("distillation_KMJ0", "Distilled_resnet18_KMJ0", "student", 50, 20,
           Reference(60.60, 85.57, 0.01058444), soft="kd", alpha="per epoch", settings={"T": 2.0}),

    # logits and features: alpha CE + (1 - alpha) KD + beta MSE + gamma S2T
    Recipe("distillation_LDH", "Distilled_resnet18_LDH", "feature_student", 50, 20,
           Reference(63.46, 87.70, 0.00923391), soft="kd", alpha=0.7, settings={"T": 2.0}, beta=0.5),
    Recipe("distillation_LDH2", "Distilled_resnet18_LDH2", "feature_student", 50, 20,
           Reference(60.49, 85.33, 0.01046962), soft="kd", alpha=0.7, settings={"T": 2.0}, gamma=0.2),
    Recipe("distillation_LDH3", "Distilled_resnet18_LDH3", "feature_student", 50, 20,
           Reference(60.65, 85.51, 0.01057834), soft="kd", alpha=0.7, settings={"T": 2.0}, gamma=0.1),

    # features: alpha CE + (1 - alpha) MSE
    Recipe("distillation_LDH5", "Distilled_resnet18_LDH5", "feature_student", 50, 20,
           Reference(63.17, 87.52, 0.00746035), soft="mse", alpha=0.7),
    Recipe("distillation_LDH6", "Distilled_resnet18_LDH6", "feature_student", 50, 20,
           Reference(67.32, 89.10, 0.00675732), soft="mse", alpha="per epoch"),
    Recipe("distillation_LDH9", "Distilled_resnet18_LDH9", "feature_student", 50, 20,
           Reference(65.92, 89.11, 0.00686661), soft="mse", alpha="per iteration"),
    Recipe("distillation_LDH10", "Distilled_resnet18_LDH10", "feature_student", 50, 20,
           Reference(66.60, 89.26, 0.00683499), soft="mse", alpha="first epoch"),
]
# fmt: on

RECIPES = {row.job: row for row in ROWS}
