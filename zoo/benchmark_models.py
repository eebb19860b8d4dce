"""The networks of the CIFAR-100 distillation benchmark, by the field's names (RepDistiller's and mdistiller's).

Parameters are named as in the checkpoints that circulate: RepDistiller's, and for the ResNets chenyaofo's too. The
whole last map is pooled, so images of any size will do, from 1 pixel; for the VGGs from 8.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from outputs import STAGES, Outputs, PooledClassifier


class BenchmarkNetwork(PooledClassifier, nn.Module):
    """Images, float32 (B, 3, H, W), to Outputs: logits, last_map (the map that is pooled and classified) and maps.

    A subclass has `fc`, its final linear layer, and features().
    """

    def __init__(self):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The maps at the ends of the stages, in order, and the last map."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> Outputs:
        ends, last_map = self.features(images)
        return self.outputs(last_map, dict(zip(STAGES, ends, strict=False)))


class ResNet(BenchmarkNetwork):
    """He et al. 2016, section 4.2: a 3x3 stem, three stages of (depth - 2) / 6 basic blocks each.

    widths: channels of the stem and of the stages. Unlike the paper's, a shortcut between widths is a 1x1 convolution.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv(3, widths[0], 3), nn.BatchNorm2d(widths[0])
        for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
            setattr(self, f"layer{i}", stage(basic_block, n_in, n_out, (depth - 2) // 6, 1 if i == 1 else 2))
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        ends = in_turn((self.layer1, self.layer2, self.layer3), relu(self.bn1(self.conv1(images))))
        return ends, ends[-1]


class WideResNet(BenchmarkNetwork):
    """Zagoruyko and Komodakis 2016: three stages of (depth - 4) / 6 pre-activation blocks, `width` times as wide.

    A stage ends at the sum of its last block, as RepDistiller has it: before the batch norm and ReLU with which the
    next one begins, so its map has both signs. The last map is stage 3's after the final batch norm and ReLU.
    """

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(3, widths[0], 3)
        for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
            blocks = stage(PreactivationBlock, n_in, n_out, (depth - 4) // 6, 1 if i == 1 else 2)
            setattr(self, f"block{i}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        ends = in_turn((self.block1, self.block2, self.block3), self.conv1(images))
        return ends, relu(self.bn1(ends[-1]))


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU; a shortcut between widths starts after the first."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), conv(n_in, n_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), conv(n_out, n_out, 3)
        self.convShortcut = None if n_in == n_out else conv(n_in, n_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(relu(self.bn2(self.conv1(activated))))


class VGG(BenchmarkNetwork):
    """Simonyan and Zisserman 2015 with batch norm and one linear layer: five blocks of n 3x3 convolutions each.

    Blocks 0 to 2 are followed by a pooling, as is block 3 for images of 64 pixels or more. The stages are blocks 1 to
    4; each ends before its pooling.
    """

    def __init__(self, n: int, num_classes: int):
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            layers = []
            for channels in (n_in, *[n_out] * (n - 1)):
                conv_with_bias = nn.Conv2d(channels, n_out, 3, padding=1)
                layers += [conv_with_bias, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))  # the last ReLU is in features()
        self.classifier = nn.Linear(widths[-1], num_classes)
        initialise(self, linear_std=0.01)

    @property
    def fc(self) -> nn.Linear:
        return self.classifier

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        pools_last = images.shape[2] >= 64
        x = relu(self.block0(images))
        ends = []
        for i, block in enumerate((self.block1, self.block2, self.block3, self.block4)):
            x = relu(block(F.max_pool2d(x, 2) if i < 3 or pools_last else x))
            ends.append(x)
        return ends, x


class MobileNetV2(BenchmarkNetwork):
    """Sandler et al. 2018 at half width, with ReLU for ReLU6, and strides for small images: 1/16 of the side.

    The stages end after blocks 1, 2, 4 and 6, as RepDistiller has it: before the next halving or where blocks end, at a
    convolution without ReLU, so their maps have both signs. The last map is that of one more, with ReLU: 1280 channels.
    """

    # of the blocks: expansion, channels, how many, stride of the first
    BLOCKS = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(3, 16, 3, stride=2))
        self.blocks = nn.ModuleList()
        n_in = 16
        for expansion, n_out, n, stride in self.BLOCKS:
            self.blocks.append(stage(partial(InvertedResidual, expansion), n_in, n_out, n, stride))
            n_in = n_out
        self.conv2 = nn.Sequential(*conv_bn_relu(n_in, 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialise(self, linear_std=0.01)

    @property
    def fc(self) -> nn.Linear:
        return self.classifier[0]

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps = in_turn(self.blocks, self.conv1(images))
        return [maps[i] for i in (1, 2, 4, 6)], self.conv2(maps[-1])


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the channels, depthwise 3x3, 1x1 without ReLU; a sum where shapes allow."""

    def __init__(self, expansion: int, n_in: int, n_out: int, stride: int):
        super().__init__()
        hidden = expansion * n_in
        self.conv = nn.Sequential(
            *conv_bn_relu(n_in, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            *conv_bn_relu(hidden, n_out, 1)[:2],
        )
        self.sums = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.sums else self.conv(x)


class ShuffleNet(BenchmarkNetwork):
    """What the two ShuffleNets share: a 1x1 stem to 24 channels and three stages of 4, 8 and 4 units. torch's init."""

    def __init__(self, unit: Callable[[int, int, int], nn.Module], widths: tuple[int, int, int]):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 24, 1), nn.BatchNorm2d(24)
        for i, (n_in, n_out) in enumerate(pairwise((24, *widths)), start=1):
            setattr(self, f"layer{i}", stage(unit, n_in, n_out, 8 if i == 2 else 4, 2))

    @property
    def fc(self) -> nn.Linear:
        return self.linear

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        ends = in_turn((self.layer1, self.layer2, self.layer3), relu(self.bn1(self.conv1(images))))
        return ends, ends[-1]


class ShuffleNetV1(ShuffleNet):
    """Zhang et al. 2018, 3 groups."""

    def __init__(self, num_classes: int):
        super().__init__(ShuffleUnitV1, (240, 480, 960))
        self.linear = nn.Linear(960, num_classes)


class ShuffleUnitV1(nn.Module):
    """A bottleneck of grouped 1x1 convolutions; where it halves the map, beside its pooled input instead of a sum."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.halves = stride == 2
        n_out -= n_in if self.halves else 0
        hidden = n_out // 4
        self.groups = 1 if n_in == 24 else 3  # not over the few channels of the stem
        self.conv1, self.bn1 = conv(n_in, hidden, 1, groups=self.groups), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, hidden, 3, stride, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = conv(hidden, n_out, 1, groups=3), nn.BatchNorm2d(n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = shuffled(relu(self.bn1(self.conv1(x))), self.groups)
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return relu(torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1) if self.halves else out + x)


class ShuffleNetV2(ShuffleNet):
    """Ma et al. 2018 at width 1; its last map is that of one more 1x1 convolution, to 1024 channels."""

    def __init__(self, num_classes: int):
        super().__init__(shuffle_unit_v2, (116, 232, 464))
        self.conv2, self.bn2 = conv(464, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        ends, x = super().features(images)
        return ends, relu(self.bn2(self.conv2(x)))


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass three convolutions, the others nothing; then both are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        n = channels // 2
        self.conv1, self.bn1 = conv(n, n, 1), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3, groups=n), nn.BatchNorm2d(n)
        self.conv3, self.bn3 = conv(n, n, 1), nn.BatchNorm2d(n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        untouched, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(out)))))
        return shuffled(torch.cat([untouched, relu(self.bn3(self.conv3(out)))], 1), 2)


class Halving(nn.Module):
    """The first unit of a stage of ShuffleNetV2: two branches over all channels, each with a depthwise stride of 2."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        n = n_out // 2
        self.conv1, self.bn1 = conv(n_in, n_in, 3, 2, groups=n_in), nn.BatchNorm2d(n_in)
        self.conv2, self.bn2 = conv(n_in, n, 1), nn.BatchNorm2d(n)
        self.conv3, self.bn3 = conv(n_in, n, 1), nn.BatchNorm2d(n)
        self.conv4, self.bn4 = conv(n, n, 3, 2, groups=n), nn.BatchNorm2d(n)
        self.conv5, self.bn5 = conv(n, n, 1), nn.BatchNorm2d(n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(relu(self.bn3(self.conv3(x)))))
        return shuffled(torch.cat([left, relu(self.bn5(self.conv5(right)))], 1), 2)


# name: maker of a network for so many classes
ARCHITECTURES: dict[str, Callable[[int], BenchmarkNetwork]] = {
    **{f"resnet{depth}": partial(ResNet, depth, (16, 16, 32, 64)) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, (32, 64, 128, 256)) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth, width in ((16, 2), (40, 1), (40, 2))},
    "vgg8": partial(VGG, 1),
    "vgg13": partial(VGG, 2),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}

relu = partial(F.relu, inplace=True)  # of the output of a batch norm, a sum or cat, which nothing else needs


def conv(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def conv_bn_relu(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(n_in, n_out, kernel, stride, groups), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def basic_block(n_in: int, n_out: int, stride: int) -> BasicBlock:
    """torchvision's, with a 1x1 convolution and batch norm as the shortcut where the shape changes."""
    downsample = None if stride == 1 and n_in == n_out else nn.Sequential(*conv_bn_relu(n_in, n_out, 1, stride)[:2])
    return BasicBlock(n_in, n_out, stride, downsample)


def shuffle_unit_v2(n_in: int, n_out: int, stride: int) -> nn.Module:
    return ShuffleUnitV2(n_out) if stride == 1 else Halving(n_in, n_out)


def stage(unit: Callable[[int, int, int], nn.Module], n_in: int, n_out: int, n: int, stride: int) -> nn.Sequential:
    """n units, of which the first has the stride and brings n_in channels to n_out."""
    return nn.Sequential(unit(n_in, n_out, stride), *[unit(n_out, n_out, 1) for _ in range(n - 1)])


def in_turn(stages: tuple[nn.Module, ...] | nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of each, which is the next one's input."""
    return [x := module(x) for module in stages]


def shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channels of (B, C, H, W) in turn from each of the groups: 0, C/g, 2C/g, ..., 1, C/g + 1, ..."""
    return F.channel_shuffle(x, groups)


def initialise(network: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions: He's normal by fan_out, biases 0. Linear layers: torch's, or normal of that deviation, biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
