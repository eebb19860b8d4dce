"""The networks: torchvision's ResNets with a stem for small images, or their own, and the student with a projector."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from outputs import STAGES, Outputs, PooledClassifier, Shapes
from util.runtime import Unsuited, UserError, is_out_of_memory
from zoo import library_models
from zoo.benchmark_models import ARCHITECTURES

TEACHER_MAP = 2048  # channels of the teacher's last feature map
STUDENT_MAP = 512  # and of the student's


class CifarResNet(PooledClassifier, ResNet):
    """torchvision's ResNet with a stem for small images: conv1 3x3 of stride 1, no maxpool. Same state_dict keys."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int):
        super().__init__(block, layers)
        # Replaced after torchvision's own initialisation, so with nn.Conv2d's and nn.Linear's default weights.
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(self.fc.in_features, num_classes)

    def use_standard_stem(self) -> None:
        """Take torchvision's own stem for large images: conv1 7x7 of stride 2, and a maxpool of stride 2."""
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> Outputs:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = {}
        for name, stage in zip(STAGES, (self.layer1, self.layer2, self.layer3, self.layer4), strict=True):
            maps[name] = x = stage(x)
        return self.outputs(x, maps)


class FeatureStudent(CifarResNet):
    """A ResNet-18 with a projector, a learnt 1x1 convolution to the teacher's map. Keys: ResNet-18's and proj.*."""

    def __init__(self, num_classes: int):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.proj = nn.Conv2d(STUDENT_MAP, TEACHER_MAP, kernel_size=1)

    def outputs(self, last_map: torch.Tensor, maps: Mapping[str, torch.Tensor]) -> Outputs:
        return Outputs(self.classify(last_map), last_map, maps, self.proj(last_map))


class ReusingStudent(PooledClassifier):
    """What goes before a student's own class: its last map, brought to a teacher's, has that teacher's classifier.

    Keys: the student's own, its classifier's being the teacher's, which stays frozen, and transfer.*.
    """

    transfer: nn.Sequential

    def classify(self, last_map: torch.Tensor) -> torch.Tensor:
        return super().classify(self.transfer(last_map))

    def outputs(self, last_map: torch.Tensor, maps: Mapping[str, torch.Tensor]) -> Outputs:
        projected = self.transfer(last_map)
        return Outputs(super().classify(projected), last_map, maps, projected)

    def take_classifier(self, teacher: PooledClassifier) -> None:
        """Take the teacher's classifier as it stands."""
        self.fc.load_state_dict(teacher.fc.state_dict())


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "teacher": lambda num_classes: CifarResNet(Bottleneck, [3, 4, 6, 3], num_classes),
    "student": lambda num_classes: CifarResNet(BasicBlock, [2, 2, 2, 2], num_classes),
    "feature_student": FeatureStudent,
}

# What an error calls them.
TITLES = {"teacher": "ResNet-50", "student": "ResNet-18", "feature_student": "ResNet-18 with a projector"}

# The rows' networks by the names that the field has for them.
ROWS_OWN = {"resnet50": "teacher", "resnet18": "student"}

# How the names of weights begin that a student has for its distillation alone: its projector's, its transfer's.
DISTILLED_THROUGH = ("proj.", "transfer.")

STEMS = ("small", "standard", "transform_input")  # see `build`
SMALL_IMAGES = 64  # pixels; up to these the stem for small images is taken unless told otherwise


def build(arch: str, num_classes: int, stem: str = "small") -> nn.Module:
    """A fresh network with random weights from torch's global generator.

    arch: a name in NETWORKS, or one of `names`, or of timm as "timm:NAME", or of two networks as "STUDENT+TEACHER", see
    ReusingStudent. stem: "small", for images of 32 pixels or so, "standard", torchvision's own, or "transform_input",
    see library_models.transforms. Raises UserError for an unknown name and for a stem that it does not have.
    """
    if "+" in arch:
        return _reusing(*arch.split("+", 1), num_classes, stem)
    if canonical(arch) in NETWORKS:
        network = NETWORKS[canonical(arch)](num_classes)
        if stem == "standard":
            network.use_standard_stem()
        return network
    if arch in ARCHITECTURES and stem == "small":
        return ARCHITECTURES[arch](num_classes)
    if arch in ARCHITECTURES and arch not in library_models.names():
        raise UserError(f"--stem standard: {arch} has one for small images alone; choose another network")
    if not arch.startswith("timm:") and arch not in library_models.names():
        raise library_models.unknown(arch, names())
    return library_models.build(arch, num_classes, stem)


def _reusing(student: str, teacher: str, num_classes: int, stem: str) -> nn.Module:
    """The student with a transfer to the teacher's channels, and a classifier of the shape of the teacher's."""
    if "+" in teacher:
        raise Unsuited(
            f"{teacher} has its classifier behind a transfer and can't lend it; choose another loss or teacher"
        )
    network = build(student, num_classes, stem)
    with torch.device("meta"):
        other = build(teacher, num_classes, stem_of(teacher, "auto", SMALL_IMAGES))
    for name, own in ((student, network), (teacher, other)):
        if not isinstance(own, PooledClassifier):
            raise Unsuited(f"{name} has no classifier of one linear layer that can be reused; choose another network")
    network.transfer = _transfer(network.fc.in_features, other.fc.in_features)
    place = next(name for name, module in network.named_modules() if module is network.fc)
    network.set_submodule(place, nn.Linear(other.fc.in_features, num_classes).requires_grad_(False))
    # The student itself, in a class of ours: a module that holds it would be in the names of all parameters.
    network.__class__ = type(f"Reusing{type(network).__name__}", (ReusingStudent, type(network)), {})
    return network


def _transfer(narrow: int, wide: int) -> nn.Sequential:
    """From a student's channels to a teacher's, in between half of these, as published."""
    middle, layers = max(1, wide // 2), []
    for n_in, n_out, size in ((narrow, middle, 1), (middle, middle, 3), (middle, wide, 1)):
        conv = nn.Conv2d(n_in, n_out, size, padding=size // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(n_out), nn.ReLU()]
    return nn.Sequential(*layers)


def canonical(arch: str) -> str:
    """One name for a network that has several: the row's own, where it is a row's."""
    return ROWS_OWN.get(arch, arch)


def names() -> list[str]:
    """The names of networks that `build` knows besides NETWORKS: the field's, then torchvision's."""
    return list(dict.fromkeys([*ROWS_OWN, *ARCHITECTURES, *library_models.names()]))


def stem_of(arch: str, stem: str, image_size: int) -> str:
    """The stem that "auto" means for images of that side, "small" or "standard"; any other is what it is.

    "transform_input" means the same as "auto" for the networks that have none, as it is one flag for two networks.
    """
    arch = arch.partition("+")[0]
    if stem != "auto" and (stem != "transform_input" or library_models.transforms(arch)):
        return stem
    if arch in ARCHITECTURES and arch not in library_models.names():
        return "small"
    has_small = canonical(arch) in NETWORKS or arch in ARCHITECTURES or library_models.has_small_stem(arch)
    return "small" if image_size <= SMALL_IMAGES and has_small else "standard"


def has_both_stems(arch: str) -> bool:
    """Whether the images' size tells the network's stem, as it has one for small images and one for large ones."""
    return stem_of(arch, "auto", SMALL_IMAGES) != stem_of(arch, "auto", SMALL_IMAGES + 1)


def library_name(arch: str) -> str | None:
    """torchvision's own name of the network, None where it has none of that kind."""
    arch = arch.partition("+")[0]
    name = {"teacher": "resnet50", "student": "resnet18", "feature_student": "resnet18"}.get(arch, arch)
    return name if name in library_models.names() else None


def without_projector(arch: str) -> str:
    """The network's one name, whether or not it has a projector, on which its logits do not depend."""
    return "student" if arch == "feature_student" else canonical(arch)


def surplus(arch: str) -> tuple[str, ...]:
    """How names of weights begin that a checkpoint of the network may hold and the network here has not."""
    if canonical(arch) == "student":
        return ("proj.",)
    return library_models.surplus(arch) if library_name(arch) else ()


def classifier_weights(arch: str, stem: str) -> list[str]:
    """The names of its weights whose shapes depend on the number of classes."""
    return _differing(_skeleton(arch, 2, stem), _skeleton(arch, 3, stem))


def own_weights(arch: str, stem: str) -> list[str]:
    """The names of its weights that its kind with 1000 classes can't give it, which is torchvision's where it has one.

    Of a student that reuses a teacher's classifier these are the transfer's, too.
    """
    here, library = _skeleton(arch, 2, stem), library_name(arch)
    other = arch.partition("+")[0]
    return _differing(here, _skeleton(library, 3, "standard") if library else _skeleton(other, 3, stem))


def stem_weights(arch: str) -> list[str]:
    """The names of its weights whose shapes depend on the stem."""
    return _differing(_skeleton(arch, 2, "small"), _skeleton(arch, 2, "standard")) if has_both_stems(arch) else []


class Skeleton(NamedTuple):
    """The shapes of a network's weights under their names. head: of those that depend on the number of classes."""

    body: Mapping[str, torch.Size]
    head: Mapping[str, torch.Size]


def skeleton(arch: str) -> Skeleton:
    """The names of a network's weights, and their shapes with the stem for small images where it has one."""
    stem = stem_of(arch, "auto", SMALL_IMAGES)
    shapes, head = _skeleton(arch, 2, stem), classifier_weights(arch, stem)
    body = {name: shape for name, shape in shapes.items() if name not in head}
    return Skeleton(body, {name: shapes[name] for name in head})


@functools.cache
def _skeleton(arch: str, num_classes: int, stem: str) -> dict[str, torch.Size]:
    ours = "+" in arch or canonical(arch) in NETWORKS or (arch in ARCHITECTURES and stem == "small")
    with torch.device("meta"):
        network = (build if ours else library_models.layers)(arch, num_classes, stem)
    return {name: value.shape for name, value in network.state_dict().items()}


def _differing(shapes: dict[str, torch.Size], others: dict[str, torch.Size]) -> list[str]:
    return [name for name, shape in shapes.items() if others.get(name) != shape]


def prototypes(network: nn.Module) -> torch.Tensor | None:
    """The weights of its final linear layer, (classes, features); None where it ends in another layer."""
    linear = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == network.num_classes]
    return linear[-1].weight if linear else None


@torch.no_grad()
def shapes(network: nn.Module, image_size: int, n_images: int) -> Shapes:
    """What the network gives for n_images images of that side, found by running a copy of it over one.

    Raises UserError where such images are too small for it.
    """
    if hasattr(network, "check"):
        network.check(image_size)
    probe = copy.deepcopy(network).eval()
    weight = next(probe.parameters())
    try:
        outputs = probe(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, AssertionError, ValueError) as error:  # whatever a layer says that gets no pixels
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        pixels = f"{image_size}x{image_size} pixels"
        raise UserError(f"a network can't take images of {pixels} ({reason}); choose another size or network") from None
    maps = {name: tuple(value.shape[1:]) for name, value in outputs.maps.items()}
    last_map, projected = (
        value if value is None else tuple(value.shape[1:]) for value in (outputs.last_map, outputs.projected)
    )
    weights = prototypes(network)
    of_classes = None if weights is None else tuple(weights.shape)
    return Shapes(outputs.logits.shape[1], last_map, maps, n_images, projected, of_classes)


def folded(network: nn.Module) -> nn.Module:
    """A copy for inference alone: in eval mode, frozen, each batch norm that follows a convolution folded into it."""
    if hasattr(network, "folded"):
        return network.folded().to(memory_format=torch.channels_last)
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (bn_name, bn) in zip(children, children[1:], strict=False):
            # A network here defines a batch norm directly after a convolution only where it is computed after it, too.
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return network.to(memory_format=torch.channels_last)
