"""The networks: torchvision's ResNet-50 and ResNet-18 with a CIFAR stem, and the student with a projector."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from util.convolution import Conv3x3

TEACHER_MAP = 2048  # channels of the teacher's last feature map
STUDENT_MAP = 512  # and of the student's


class Outputs(NamedTuple):
    """What a network gives for B images; losses take what they need of it.

    logits: float32 (B, classes).
    layer4: the last feature map, before pooling: (B, 512, H, W) for a ResNet-18, (B, 2048, H, W) for a ResNet-50, with
        H = W = image side / 8, rounded up.
    projected: a feature student's layer4 brought to the teacher's shape, (B, 2048, H, W).
    head: of a teacher, its frozen classifier: a function from a map like layer4 to logits.
    """

    logits: torch.Tensor | None = None
    layer4: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    head: Callable[[torch.Tensor], torch.Tensor] | None = None


class CifarResNet(ResNet):
    """torchvision's ResNet with a stem for small images: conv1 3x3 of stride 1, no maxpool. Same state_dict keys."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], num_classes: int):
        super().__init__(block, layers)
        # Replaced after torchvision's own initialisation, so with nn.Conv2d's and nn.Linear's default weights.
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(self.fc.in_features, num_classes)
        Conv3x3.replace_all(self)

    def classify(self, layer4: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of a last feature map.

        In the weights' own precision, float32, whatever the autocast: logits rounded to bfloat16 tie, and a tie is
        settled by the class's number.
        """
        with torch.autocast(layer4.device.type, enabled=False):
            return self.fc(torch.flatten(self.avgpool(layer4.to(self.fc.weight.dtype)), 1))

    def forward(self, images: torch.Tensor) -> Outputs:
        x = self.relu(self.bn1(self.conv1(images)))
        layer4 = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Outputs(logits=self.classify(layer4), layer4=layer4)


class FeatureStudent(CifarResNet):
    """A ResNet-18 with a projector, a learnt 1x1 convolution to the teacher's map. Keys: ResNet-18's and proj.*."""

    def __init__(self, num_classes: int):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.proj = nn.Conv2d(STUDENT_MAP, TEACHER_MAP, kernel_size=1)

    def forward(self, images: torch.Tensor) -> Outputs:
        outputs = super().forward(images)
        return outputs._replace(projected=self.proj(outputs.layer4))


NETWORKS: dict[str, Callable[[int], CifarResNet]] = {
    "teacher": lambda num_classes: CifarResNet(Bottleneck, [3, 4, 6, 3], num_classes),
    "student": lambda num_classes: CifarResNet(BasicBlock, [2, 2, 2, 2], num_classes),
    "feature_student": FeatureStudent,
}

# What an error calls them.
TITLES = {"teacher": "ResNet-50", "student": "ResNet-18", "feature_student": "ResNet-18 with a projector"}


def build(network: str, num_classes: int) -> CifarResNet:
    """A fresh network, "teacher", "student" or "feature_student", with random weights from torch's global generator."""
    return NETWORKS[network](num_classes)


def folded(network: CifarResNet) -> CifarResNet:
    """A copy for inference alone: in eval mode, frozen, each batch norm folded into the convolution before it."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in network.modules():
        children = list(module.named_children())
        for (conv_name, conv), (bn_name, bn) in zip(children, children[1:], strict=False):
            # In torchvision's ResNets every batch norm directly follows its convolution in the order of definition.
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, bn_name, nn.Identity())
    return network.to(memory_format=torch.channels_last)
