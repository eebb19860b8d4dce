"""The thirteen experiments as data, one row each, and the ways to train them. To add an experiment is to add a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from util.bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, Bound

EPOCHS = Bound(int, "a whole number from 1 to 100000", lambda x: 1 <= x <= 100_000)


class Reference(NamedTuple):
    """Figures on the CIFAR-100 test set, one run: top-1 and top-5 in percent, Test Loss as `test.py` prints it."""

    top1: float
    top5: float
    test_loss: float


class Claim(NamedTuple):
    """A figure that a paper gives: top-1 on the CIFAR-100 test set in percent, the paper, after how many epochs.

    best: of the epoch that is best on the test images, where those of this project are always the last one's.
    """

    top1: float
    source: str
    epochs: int = 240
    best: bool = False


def _flag(bound: Bound, words: str | None = None, **default) -> Any:
    """A field that a flag of its name overrides for one run: what it may be, and its line of help."""
    return field(metadata={"bound": bound, "help": words}, **default)


@dataclass(frozen=True)
class Recipe:
    """One experiment: the network trained and its loss, alpha CE + (1 - alpha) weight soft + beta MSE + gamma S2T.

    network: a name in models.NETWORKS: "teacher", "student", "feature_student".
    arch: of another network in its place, by a name that models.build knows; None for the row's own.
    soft: name of the distillation loss in losses.LOSSES that (1 - alpha) weighs; None for hard labels only.
    alpha: the weight of the hard labels, a number or the name of a schedule in losses.ALPHA_SCHEDULES.
    weight: of the soft loss; None for the loss's own, see losses.LOSSES.
    settings: of the losses, where they are not the losses' own defaults, like {"T": 2.0}, the temperature of KD.
    reference: figures to compare with, where there are any.
    training: a name in TRAININGS; `under` gives a recipe another than the reference's.
    suite: the table that it belongs to besides its own, see zoo/suites.py. claimed: a paper's figure beside it.
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
    beta: float = _flag(NOT_NEGATIVE, "weight of the feature MSE (LDH rows, any --loss)", default=0.0)
    gamma: float = _flag(NOT_NEGATIVE, "weight of student to teacher, S2T (LDH rows, any --loss)", default=0.0)
    learning_rate: float = _flag(POSITIVE, default=0.001)
    batch_size: int = _flag(COUNT, default=256)
    training: str = "reference"
    arch: str | None = None
    weight: float | None = _flag(POSITIVE, "of the soft loss; with --loss, default: its own, see --list", default=1.0)
    suite: str = ""
    claimed: Claim | None = None

    @property
    def built(self) -> str:
        """The name by which models.build knows its network."""
        return self.arch or self.network

    @property
    def distils(self) -> bool:
        """True for the rows that need a teacher."""
        return self.soft is not None or self.beta > 0 or self.gamma > 0


@dataclass(frozen=True)
class Training:
    """How networks are trained, whatever their loss.

    epochs, batch_size, learning_rate: None is the recipe's own. mobile_learning_rate: that of the networks in MOBILE.
    optimiser: "adam", or "sgd" with momentum, Nesterov's or plain, and weight_decay of every parameter.
    schedule: the learning rate's: "step", x0.1 every scheduler_step epochs; "milestones", x0.1 at each of these epochs;
        "cosine" to 0 after a linear warm-up. Milestones and warm-up are those of so many epochs, and are scaled with
        the recipe's.
    label_smoothing: of the hard labels. mixup, cutmix: the parameters of their Beta distributions; each batch is mixed
        by one of those that are not 0. augment: random crop and flip.
    """

    optimiser: str
    schedule: str
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    mobile_learning_rate: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images are shown as mixtures of two."""
        return self.mixup > 0 or self.cutmix > 0


MOBILE = ("mobilenet", "shufflenet")  # how the names of the networks begin that want a smaller learning rate

TRAININGS = {
    # Of the table of experiments; each row has its own epochs and scheduler_step.
    "reference": Training("adam", "step"),
    # Tian, Krishnan, Isola, "Contrastive Representation Distillation" (2020), and its repository RepDistiller, which
    # mdistiller follows: what the field's tables for CIFAR-100 are measured with. Momentum is plain, as in their code.
    "benchmark": Training(
        "sgd", "milestones", epochs=240, batch_size=64, learning_rate=0.05, mobile_learning_rate=0.01,
        momentum=0.9, weight_decay=5e-4, milestones=(150, 180, 210), augment=True,
    ),
    # SGD, epochs, batch and weight decay: DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks
    # with Cutout" (2017), for a ResNet-18 on CIFAR-100. Cosine, warm-up, label smoothing and mixup's 0.2: He et al.,
    # "Bag of Tricks for Image Classification" (2019). Cutmix's 1.0: Yun et al., "CutMix" (2019). One of the two for
    # each batch, at random: torchvision's training reference.
    "strong": Training(
        "sgd", "cosine", epochs=200, batch_size=128, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4,
        warmup_epochs=5, label_smoothing=0.1, mixup=0.2, cutmix=1.0, augment=True,
    ),
}  # fmt: skip


def under(recipe: Recipe, training: str) -> Recipe:
    """The recipe trained in the way of that name, with its epochs, batch size and learning rate.

    Such a run is no row's, and its name says so. The learning rate is that of the recipe's network.
    """
    if training == recipe.training:
        return recipe
    ways, name = TRAININGS[training], f"{recipe.job}_{training}"
    rate = ways.mobile_learning_rate if recipe.built.startswith(MOBILE) else None
    sets = {"epochs": ways.epochs, "batch_size": ways.batch_size, "learning_rate": rate or ways.learning_rate}
    return replace(recipe, job=name, checkpoint=name, training=training, reference=None, **sets)


def milestones(recipe: Recipe) -> list[int]:
    """The epochs, from 0, before which the learning rate falls: the training's, in proportion to the recipe's own."""
    training = TRAININGS[recipe.training]
    return [int(epoch * recipe.epochs / training.epochs + 0.5) for epoch in training.milestones]


def warmup_epochs(recipe: Recipe) -> float:
    """The epochs of the warm-up, in proportion to the recipe's own; parts of one too."""
    training = TRAININGS[recipe.training]
    return training.warmup_epochs * recipe.epochs / training.epochs if training.warmup_epochs else 0.0


def described(recipe: Recipe) -> dict[str, Any]:
    """All that decides how the recipe trains, plain values under their names, the losses' settings among them.

    Of another training than the reference's, all that it is made of; the reference's is not named.
    """
    values = {part.name: getattr(recipe, part.name) for part in fields(Recipe)}
    for name in ("reference", "suite", "claimed"):  # which say what its figures stand beside
        del values[name]
    values = values.pop("settings") | values
    if recipe.training == "reference":
        del values["training"]
        return values
    del values["scheduler_step"]  # which has no effect
    training = TRAININGS[recipe.training]
    names = ["optimiser", "momentum", "nesterov", "weight_decay", "schedule", "label_smoothing", "mixup", "cutmix"]
    values |= {name: getattr(training, name) for name in names}
    return values | {"milestones": milestones(recipe), "warmup_epochs": warmup_epochs(recipe)}


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
           Reference(66.60, 89.26, 0.00683499), soft="mse", alpha="first epoch, then per epoch"),
]
# fmt: on

RECIPES = {row.job: row for row in ROWS}
