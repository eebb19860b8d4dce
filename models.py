"""The networks: torchvision's ResNets with a stem for small images, or their own, and the student with a projector."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from outputs import STAGES, Outputs, PooledClassifier, Shapes

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
        return Outputs(logits=self.classify(x), last_map=x, maps=maps)


class FeatureStudent(CifarResNet):
    """A ResNet-18 with a projector, a learnt 1x1 convolution to the teacher's map. Keys: ResNet-18's and proj.*."""

    def __init__(self, num_classes: int):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.proj = nn.Conv2d(STUDENT_MAP, TEACHER_MAP, kernel_size=1)

    def forward(self, images: torch.Tensor) -> Outputs:
        outputs = super().forward(images)
        return outputs._replace(projected=self.proj(outputs.last_map))


NETWORKS: dict[str, Callable[[int], CifarResNet]] = {
    "teacher": lambda num_classes: CifarResNet(Bottleneck, [3, 4, 6, 3], num_classes),
    "student": lambda num_classes: CifarResNet(BasicBlock, [2, 2, 2, 2], num_classes),
    "feature_student": FeatureStudent,
}

# What an error calls them.
TITLES = {"teacher": "ResNet-50", "student": "ResNet-18", "feature_student": "ResNet-18 with a projector"}


def build(arch: str, num_classes: int, stem: str = "small") -> CifarResNet:
    """A fresh network, by its name in NETWORKS, with random weights from torch's global generator.

    stem: "small", for images of 32 pixels or so, or "standard", torchvision's own.
    """
    network = NETWORKS[arch](num_classes)
    if stem == "standard":
        network.use_standard_stem()
    return network


@torch.no_grad()
def shapes(network: CifarResNet, image_size: int, n_images: int) -> Shapes:
    """What the network gives for n_images images of that side, found by running a copy of it over one."""
    probe = copy.deepcopy(network).eval()
    weight = next(probe.parameters())
    outputs = probe(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    maps = {name: tuple(value.shape[1:]) for name, value in outputs.maps.items()}
    return Shapes(outputs.logits.shape[1], tuple(outputs.last_map.shape[1:]), maps, n_images)


def folded(network: nn.Module) -> nn.Module:
    """A copy for inference alone: in eval mode, frozen, each batch norm that follows a convolution folded into it."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (bn_name, bn) in zip(children, children[1:], strict=False):
            # A network here defines a batch norm directly after a convolution only where it is computed after it, too.
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return network.to(memory_format=torch.channels_last)
