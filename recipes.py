"""The thirteen experiments as data: one row each, nothing else. To add an experiment is to add a row."""

from dataclasses import dataclass
from typing import NamedTuple


class Reference(NamedTuple):
    """Figures on the CIFAR-100 test set, one run: top-1 and top-5 in percent, Test Loss as `test.py` prints it."""

    top1: float
    top5: float
    test_loss: float


@dataclass(frozen=True)
class Recipe:
    """One experiment: the network trained and its loss, alpha CE + (1 - alpha) soft + beta MSE + gamma S2T.

    network: "teacher", "student" or "feature_student" (see models.build).
    soft: name of the distillation loss in losses.SOFT that (1 - alpha) weighs; None for hard labels only.
    alpha: the weight of the hard labels, a number or the name of a schedule in losses.ALPHA_SCHEDULES.
    T: the temperature; None where the loss has none.
    reference: figures to compare with, where there are any.
    """

    job: str
    checkpoint: str
    network: str
    epochs: int
    scheduler_step: int
    reference: Reference | None = None
    soft: str | None = None
    alpha: float | str = 1.0
    T: float | None = None
    beta: float = 0.0
    gamma: float = 0.0
    learning_rate: float = 0.001
    batch_size: int = 256

    @property
    def distils(self) -> bool:
        """True for the rows that need a teacher."""
        return self.soft is not None

    @property
    def compares_maps(self) -> bool:
        """True for the rows whose loss looks at the teacher's feature map."""
        return self.soft == "mse" or self.beta > 0


# fmt: off
ROWS = [
    Recipe("teacher", "resnet50", "teacher", 100, 25, Reference(69.87, 91.17, 0.00748289)),
    Recipe("student", "resnet18", "student", 50, 20, Reference(59.22, 84.59, 0.00915756)),

    # logits: alpha CE + (1 - alpha) KD
    Recipe("distillation", "Distilled_resnet18", "student", 50, 20,
           Reference(60.15, 85.35, 0.01049371), soft="kd", alpha=0.7, T=2.0),
    Recipe("distillation_KMJ2", "Distilled_resnet18_KMJ2", "student", 50, 20,
           Reference(60.37, 85.53, 0.01071865), soft="kd", alpha="per iteration", T=2.0),
    Recipe("distillation_KMJ1", "Distilled_resnet18_KMJ1", "student", 60, 20,
           Reference(60.41, 85.50, 0.01063989), soft="kd", alpha="per epoch", T=2.0),
    Recipe("distillation_KMJ0", "Distilled_resnet18_KMJ0", "student", 50, 20,
           Reference(60.60, 85.57, 0.01058444), soft="kd", alpha="per epoch", T=2.0),

    # logits and features: alpha CE + (1 - alpha) KD + beta MSE + gamma S2T
    Recipe("distillation_LDH", "Distilled_resnet18_LDH", "feature_student", 50, 20,
           Reference(63.46, 87.70, 0.00923391), soft="kd", alpha=0.7, T=2.0, beta=0.5),
    Recipe("distillation_LDH2", "Distilled_resnet18_LDH2", "feature_student", 50, 20,
           Reference(60.49, 85.33, 0.01046962), soft="kd", alpha=0.7, T=2.0, gamma=0.2),
    Recipe("distillation_LDH3", "Distilled_resnet18_LDH3", "feature_student", 50, 20,
           Reference(60.65, 85.51, 0.01057834), soft="kd", alpha=0.7, T=2.0, gamma=0.1),

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
