"""The benchmark's networks: sizes, names, what they compute, and that folding and fast convolutions change nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F

import models
from outputs import Outputs
from util.convolution import replace_all
from zoo.benchmark_models import ARCHITECTURES

PARAMETERS = {  # for 100 classes
    **{"resnet20": 278_324, "resnet32": 472_756, "resnet44": 667_188, "resnet56": 861_620, "resnet110": 1_736_564},
    **{
        "resnet8x4": 1_233_540,
        "resnet32x4": 7_433_860,
        "wrn_16_2": 703_284,
        "wrn_40_1": 569_780,
        "wrn_40_2": 2_255_156,
    },
    **{
        "vgg8": 3_965_028,
        "vgg13": 9_462_180,
        "mobilenetv2": 812_836,
        "shufflenetv1": 949_258,
        "shufflenetv2": 1_355_528,
    },
}
FAMILIES = ["resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]  # one of each
CLASSIFIERS = {"vgg8": "classifier", "mobilenetv2": "classifier.0", "shufflenetv1": "linear", "shufflenetv2": "linear"}
SMALLEST = {"vgg8": 8, "vgg13": 8}

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def trained(scaled_like_trained):
    """A network as training leaves it: trained("resnet20", 7) has 7 classes."""

    def make(name: str, num_classes: int = 10) -> torch.nn.Module:
        torch.manual_seed(0)
        return scaled_like_trained(ARCHITECTURES[name](num_classes))

    return make


class Reference:
    """The networks from their equations, by the names in a checkpoint of the field; remembers which it has used."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state, self.used = state, set()

    def weight(self, name: str) -> torch.Tensor | None:
        self.used.add(name)
        return self.state.get(name)

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = self.weight(f"{name}.weight")
        bias = self.weight(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[2] // 2, groups=groups)

    def bn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.weight(f"{name}.{part}")[:, None, None] for part in parts)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, name: str, last_map: torch.Tensor) -> torch.Tensor:
        return last_map.mean((2, 3)) @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")

    def blocks(self, prefix: str) -> range:
        n = len(prefix.split("."))
        return range(1 + max(int(key.split(".")[n]) for key in self.state if key.startswith(f"{prefix}.")))

    def has(self, prefix: str) -> bool:
        return any(key.startswith(f"{prefix}.") for key in self.state)

    def resnet(self, x):
        ends = []
        x = F.relu(self.bn("bn1", self.conv("conv1", x)))
        for layer in ("layer1", "layer2", "layer3"):
            for i in self.blocks(layer):
                b, stride = f"{layer}.{i}", 2 if layer != "layer1" and i == 0 else 1
                out = F.relu(self.bn(f"{b}.bn1", self.conv(f"{b}.conv1", x, stride)))
                out = self.bn(f"{b}.bn2", self.conv(f"{b}.conv2", out))
                if self.has(f"{b}.downsample"):
                    x = self.bn(f"{b}.downsample.1", self.conv(f"{b}.downsample.0", x, stride))
                x = F.relu(out + x)
            ends.append(x)
        return ends, x, self.linear("fc", x)

    def wrn(self, x):
        ends = []
        x = self.conv("conv1", x)
        for block in ("block1", "block2", "block3"):
            for i in self.blocks(f"{block}.layer"):
                b, stride = f"{block}.layer.{i}", 2 if block != "block1" and i == 0 else 1
                activated = F.relu(self.bn(f"{b}.bn1", x))
                out = F.relu(self.bn(f"{b}.bn2", self.conv(f"{b}.conv1", activated, stride)))
                if self.has(f"{b}.convShortcut"):
                    x = self.conv(f"{b}.convShortcut", activated, stride)
                x = x + self.conv(f"{b}.conv2", out)
            ends.append(x)
        last = F.relu(self.bn("bn1", x))
        return ends, last, self.linear("fc", last)

    def vgg(self, x):
        ends = []
        for block in ("block0", "block1", "block2", "block3", "block4"):
            x = F.max_pool2d(x, 2) if block in ("block1", "block2", "block3") else x
            for i in self.blocks(block)[::3]:
                x = F.relu(self.bn(f"{block}.{i + 1}", self.conv(f"{block}.{i}", x)))
            ends.append(x)
        return ends[1:], x, self.linear("classifier", x)

    def mobilenetv2(self, x):
        ends = []
        x = F.relu(self.bn("conv1.1", self.conv("conv1.0", x, 2)))
        for stage in self.blocks("blocks"):
            for i in self.blocks(f"blocks.{stage}"):
                b, stride = f"blocks.{stage}.{i}.conv", 2 if stage in (2, 3, 5) and i == 0 else 1
                out = F.relu(self.bn(f"{b}.1", self.conv(f"{b}.0", x)))
                out = F.relu(self.bn(f"{b}.4", self.conv(f"{b}.3", out, stride, groups=out.shape[1])))
                out = self.bn(f"{b}.7", self.conv(f"{b}.6", out))
                x = x + out if i > 0 else out
            ends += [x] if stage in (1, 2, 4, 6) else []
        last = F.relu(self.bn("conv2.1", self.conv("conv2.0", x)))
        return ends, last, self.linear("classifier.0", last)

    def shufflenetv1(self, x):
        ends = []
        x = F.relu(self.bn("bn1", self.conv("conv1", x)))
        for layer, n in (("layer1", 4), ("layer2", 8), ("layer3", 4)):
            for i in range(n):
                b, groups = f"{layer}.{i}", 1 if layer == "layer1" and i == 0 else 3
                out = shuffle(F.relu(self.bn(f"{b}.bn1", self.conv(f"{b}.conv1", x, groups=groups))), groups)
                out = self.conv(f"{b}.conv2", out, 2 if i == 0 else 1, groups=out.shape[1])
                out = self.conv(f"{b}.conv3", F.relu(self.bn(f"{b}.bn2", out)), groups=3)
                out = self.bn(f"{b}.bn3", out)
                x = F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if i == 0 else out + x)
            ends.append(x)
        return ends, x, self.linear("linear", x)

    def shufflenetv2(self, x):
        ends = []
        x = F.relu(self.bn("bn1", self.conv("conv1", x)))
        for layer, n in (("layer1", 4), ("layer2", 8), ("layer3", 4)):
            for i in range(n):
                b = f"{layer}.{i}"
                left, right = (x, x) if i == 0 else x.split(x.shape[1] // 2, 1)
                if i == 0:
                    left = self.bn(f"{b}.bn1", self.conv(f"{b}.conv1", left, 2, groups=left.shape[1]))
                    left = F.relu(self.bn(f"{b}.bn2", self.conv(f"{b}.conv2", left)))
                one, two, three = (3, 4, 5) if i == 0 else (1, 2, 3)
                right = F.relu(self.bn(f"{b}.bn{one}", self.conv(f"{b}.conv{one}", right)))
                right = self.conv(f"{b}.conv{two}", right, 2 if i == 0 else 1, groups=right.shape[1])
                right = self.conv(f"{b}.conv{three}", self.bn(f"{b}.bn{two}", right))
                x = shuffle(torch.cat([left, F.relu(self.bn(f"{b}.bn{three}", right))], 1), 2)
            ends.append(x)
        last = F.relu(self.bn("bn2", self.conv("conv2", x)))
        return ends, last, self.linear("linear", last)


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n = x.shape[1] // groups
    return x[:, [group * n + i for i in range(n) for group in range(groups)]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_outputs_are_the_fields(name, trained):
    network = trained(name).eval()
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    images = torch.randn(2, 3, 32, 32)
    reference = Reference(state)
    family = next(family for family in ("resnet", "wrn", "vgg", name) if name.startswith(family))
    with torch.no_grad():
        ends, last_map, logits = getattr(reference, family)(images)
        outputs = network(images)
    assert list(outputs.maps) == [f"stage{i + 1}" for i in range(len(ends))]
    for mine, expected in zip(outputs.maps.values(), ends, strict=True):
        close(mine, expected, rtol=1e-3, atol=1e-4)
    close(outputs.last_map, last_map, rtol=1e-3, atol=1e-4)
    close(outputs.logits, logits, rtol=1e-3, atol=1e-4)
    assert set(state) <= reference.used


def test_all_are_there():
    assert list(ARCHITECTURES) == list(PARAMETERS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts(name):
    network = ARCHITECTURES[name](100)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes(name):
    network = ARCHITECTURES[name](7).eval()
    for size in (SMALLEST.get(name, 1), 20, 33):
        outputs = network(torch.randn(1, 3, size, size))
        assert outputs.logits.shape == (1, 7) and outputs.logits.isfinite().all()
    shapes = models.shapes(network, 32, 50)
    first, last = shapes.maps["stage1"], list(shapes.maps.values())[-1]
    assert first[1:] == ((32, 32) if name.startswith(("resnet", "wrn")) else (16, 16))
    assert last[1:] == shapes.last_map[1:]


def test_a_vgg_pools_once_more_from_64_pixels_on():
    network = ARCHITECTURES["vgg8"](7).eval()
    assert [models.shapes(network, size, 50).last_map for size in (62, 64)] == [(512, 7, 7), (512, 4, 4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_classifier(name, trained):
    network = trained(name).eval()
    assert network.fc.out_features == 10 and network.fc is network.get_submodule(CLASSIFIERS.get(name, "fc"))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(2, 3, 32, 32))
        assert outputs.last_map.dtype == torch.bfloat16 and outputs.logits.dtype == torch.float32
        close(network.classify(outputs.last_map), outputs.logits, rtol=0, atol=0)
    pooled = outputs.last_map.float().mean((2, 3))
    close(outputs.logits, pooled @ network.fc.weight.T + network.fc.bias)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_all_parameters(name):
    torch.manual_seed(0)
    network = ARCHITECTURES[name](10)
    outputs = network(torch.randn(4, 3, 32, 32))
    # Of the maps, too: autograd refuses where one was overwritten after its use.
    sum(value.square().mean() for value in (outputs.logits, outputs.last_map, *outputs.maps.values())).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_first_weights(name):
    torch.manual_seed(0)
    network = ARCHITECTURES[name](100)
    own = name.startswith("shufflenet")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            n_in, n_out = module.weight[0].numel(), module.weight[:, 0].numel()
            expected = (1 / n_in) ** 0.5 / 3**0.5 if own else (2 / n_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert module.bias is None or not module.bias.any()
    std = 0.01 if name in ("vgg8", "mobilenetv2") else (1 / network.fc.in_features) ** 0.5 / 3**0.5
    assert network.fc.weight.std().item() == pytest.approx(std, rel=0.05)
    assert network.fc.bias.any().item() == (own or name == "resnet8x4")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_computes_the_same(name, trained):
    network, images = trained(name).eval(), torch.randn(4, 3, 32, 32)
    folded = models.folded(network)
    left = [key for key, module in folded.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(name.startswith("wrn") and key.endswith("bn1") for key in left)  # those that follow a sum
    with torch.no_grad():
        assert_same(folded(images), network(images))


# bf16 has 8 bits: of a gradient of MobileNetV2 up to 0.05 was seen to be rounding, where the CPU has no bf16.
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-3), (True, 0.2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_fast_convolution_and_channels_last_change_nothing(name, bf16, tolerance, trained):
    plain = trained(name).eval()
    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    replace_all(fast)
    images, results = torch.randn(8, 3, 16, 16), []
    for network, batch in ((plain, images), (fast, images.to(memory_format=torch.channels_last))):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = network(batch)
        outputs.logits.square().sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        results.append([outputs.logits, outputs.last_map, *outputs.maps.values(), *gradients])
    # A gradient that is 0 but for rounding is all rounding.
    nothing = 1e-9 * max(value.float().norm() for value in results[0])
    for theirs, mine in zip(*results, strict=True):
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm() + nothing


def assert_same(outputs: Outputs, expected: Outputs):
    assert outputs.maps.keys() == expected.maps.keys()
    values = (outputs.logits, outputs.last_map, *outputs.maps.values())
    for mine, theirs in zip(values, (expected.logits, expected.last_map, *expected.maps.values()), strict=True):
        close(mine, theirs, rtol=1e-3, atol=1e-4)
