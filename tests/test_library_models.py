"""The libraries' networks by name: that they compute what the library's own do, and their maps, stems and errors."""

import copy
import math
import sys
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import nn

import models
from outputs import STAGES, Outputs
from util.convolution import Conv3x3, replace_all
from util.runtime import UserError
from zoo import library_models

# A small one of each family, and the side of the images that it's tried with.
SIDES = {
    "resnet18": 32,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "regnet_y_400mf": 32,
    "mnasnet0_5": 32,
    "convnext_tiny": 32,
    "squeezenet1_1": 64,
    "alexnet": 64,
    "googlenet": 32,
    "swin_t": 32,
    "vit_b_32": 224,
}
SMALL_STEMS = [*list(SIDES)[:7], "mobilenet_v2"]


class Case(NamedTuple):
    name: str
    network: nn.Module
    images: torch.Tensor
    outputs: Outputs


@pytest.fixture(scope="module", params=SIDES)
def case(request):
    torch.manual_seed(0)
    network = library_models.build(request.param, 7, "standard").eval()
    scatter(network)
    images = torch.randn(2, 3, SIDES[request.param], SIDES[request.param])
    with torch.no_grad():
        return Case(request.param, network, images, network(images))


def scatter(network):
    """Give batch norms and layers of zeros values as training leaves them: else they'd hardly matter to the logits."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.7, 1.3)
            elif isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.01)  # a vision transformer's last layer


def torchvisions(name, **settings):
    """torchvision's own network, without weights; RegNet's widths can't be computed without any."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return torchvision.models.get_model(name, num_classes=7, **settings).eval()


def test_logits_are_torchvisions(case):
    without_auxiliary = {"aux_logits": False, "init_weights": False} if case.name == "googlenet" else {}
    twin = torchvisions(case.name, **without_auxiliary)
    weights = case.network.state_dict()
    assert list(weights) == list(twin.state_dict())
    with torch.no_grad():
        expected = torch.func.functional_call(twin, weights, (case.images,), strict=True)
    torch.testing.assert_close(case.outputs.logits, expected, rtol=1e-5, atol=1e-5)
    assert case.network.num_classes == expected.shape[1] == 7


def test_maps(case):
    maps, last_map = case.outputs.maps, case.outputs.last_map
    if case.name == "vit_b_32":
        assert not maps and last_map is None
        return
    assert tuple(maps) == STAGES
    assert torch.equal(maps["stage4"], last_map)
    sides = [value.shape[3] for value in maps.values()]
    assert all(value.shape[2] == side for value, side in zip(maps.values(), sides, strict=True))
    assert all(abs(2 * after - before) <= 1 for before, after in zip(sides, sides[1:], strict=False))
    with torch.no_grad():
        assert torch.equal(case.network.classify(last_map), case.outputs.logits)


def test_the_folded_copy_computes_the_same(case):
    folded = case.network.folded()
    with torch.no_grad():
        logits = folded(case.images).logits
    scale = case.outputs.logits.abs().max()
    torch.testing.assert_close(logits / scale, case.outputs.logits / scale, rtol=0, atol=1e-4)
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert bool(left) == (case.name == "densenet121")  # where some come before the convolution
    assert all(parameter.requires_grad for parameter in case.network.parameters())


def test_a_copy_in_training_has_a_gradient_for_every_parameter(case):
    network = copy.deepcopy(case.network).train()
    network(case.images).logits.square().sum().backward()
    assert [name for name, value in network.named_parameters() if value.grad is None] == []
    assert all(parameter.grad is None for parameter in case.network.parameters())  # it has weights of its own
    with torch.no_grad():
        assert torch.equal(case.network(case.images).logits, case.outputs.logits)


@pytest.mark.parametrize(
    "name", [*list(SIDES)[:-1], "inception_v3", "timm:mobilenetv3_small_100", "timm:test_efficientnet"]
)
def test_the_first_loss_is_that_of_equal_probabilities(name):
    """As the features' scale is that of a network whose batch norms work: in training mode."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = library_models.build(name, 10, "standard").train()
    scales = [torch.randn(20, 3, side, side) for side in (3, 6, 12)]  # images have structure of every size
    images = sum(nn.functional.interpolate(part, (96, 96), mode="bilinear") for part in scales)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(images / 3**0.5).logits, torch.arange(20) % 10)
    assert loss.item() == pytest.approx(math.log(10), rel=0.15)


def test_other_layers_and_layouts(case):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(case.network))
    replace_all(network)
    network.to(memory_format=torch.channels_last)
    if case.name == "resnet18":
        assert isinstance(network.bn1, nn.SyncBatchNorm) and isinstance(network.layer1[0].conv1, Conv3x3)
    with torch.no_grad():
        logits = network(case.images.to(memory_format=torch.channels_last)).logits
        torch.testing.assert_close(logits, case.outputs.logits, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(case.images)
            assert outputs.logits.dtype == torch.float32
            if outputs.last_map is not None:
                assert torch.equal(network.classify(outputs.last_map), outputs.logits)


@pytest.mark.parametrize("name", SMALL_STEMS)
def test_small_stem(name):
    assert library_models.has_small_stem(name)
    standard, small = (library_models.build(name, 7, stem).eval() for stem in ("standard", "small"))
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        before, after = standard(images), small(images)
    times = 4 if name in ("resnet18", "shufflenet_v2_x0_5", "densenet121") else 2
    for stage in STAGES:
        assert after.maps[stage].shape[2] == times * before.maps[stage].shape[2], stage
        assert after.maps[stage].shape[1] == before.maps[stage].shape[1], stage
    assert list(small.state_dict()) == list(standard.state_dict())


def test_resnet18_with_the_small_stem_is_the_student():
    student, network = models.build("student", 7).eval(), library_models.build("resnet18", 7, "small").eval()
    network.load_state_dict(student.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, outputs = student(images), network(images)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.last_map, expected.last_map)
    assert all(torch.equal(outputs.maps[stage], expected.maps[stage]) for stage in STAGES)


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet50", [256, 512, 1024, 2048]),
        ("mobilenet_v2", [24, 32, 96, 1280]),
        ("densenet121", [256, 512, 1024, 1024]),
    ],
)
def test_stages_end_with_their_blocks(name, channels):
    # Not with the next stage's first layers: a bottleneck's first convolution, an expansion, a transition's.
    network = library_models.build(name, 7, "standard").eval()
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, 32, 32)).maps
    assert [value.shape[1] for value in maps.values()] == channels


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_surplus_keys_of_auxiliary_classifiers(name):
    full = torchvisions(name, aux_logits=True, init_weights=False).state_dict()
    own = torchvisions(name, aux_logits=False, init_weights=False).state_dict()
    assert {key for key in full if key.startswith(library_models.surplus(name))} == set(full) - set(own) != set()
    assert library_models.surplus("resnet18") == ()


def test_transform_input_is_torchvisions():
    twin = torchvisions("googlenet", aux_logits=False, init_weights=False, transform_input=True)
    network = library_models.build("googlenet", 7, "transform_input").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.func.functional_call(twin, network.state_dict(), (images,), strict=True)
        outputs = network(images)
        torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(network.folded()(images).logits, expected, rtol=1e-3, atol=1e-4)
    assert tuple(outputs.maps) == STAGES
    assert repr(network) != repr(library_models.build("googlenet", 7, "standard"))  # which a teacher's cache goes by


def test_the_state_has_the_version_that_torchvisions_own_loads():
    saved = library_models.build("mnasnet0_5", 7, "standard").state_dict()
    torchvision.models.mnasnet0_5(num_classes=7).load_state_dict(saved)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "resnet18"])
def test_without_weights(name):
    with torch.device("meta"):
        weights = library_models.build(name, 7, "standard").state_dict()
    assert {value.device.type for value in weights.values()} == {"meta"}
    assert list(weights) == list(library_models.build(name, 7, "standard").state_dict())


def test_names():
    names = library_models.names()
    assert {*SIDES, "wide_resnet50_2", "inception_v3", "maxvit_t"} <= set(names)
    assert not [name for name in names if name.startswith(("quantized", "fasterrcnn", "r3d", "deeplab"))]


@pytest.mark.parametrize(
    "name, stem, message",
    [
        ("resnet19", "small", "there is no network resnet19; did you mean resnet18"),
        ("mobilenetv3_small", "standard", "did you mean mobilenet_v3_small"),
        ("?", "standard", "there is no network ?; give one of torchvision's, as resnet18, or timm:NAME"),
        ("vit_b_32", "small", "vit_b_32 has no stem for small images; use --stem standard"),
        ("vgg11", "small", "vgg11 has no stem for small images"),
        ("vgg11", "transform_input", "--stem transform_input is for googlenet and inception_v3, not for vgg11"),
    ],
)
def test_errors(name, stem, message):
    with pytest.raises(UserError) as error:
        library_models.build(name, 7, stem)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_near_names_are_of_the_names_given():
    assert "did you mean student?" in str(library_models.unknown("studnt", ["student", "teacher"]))


def test_image_sizes_that_a_network_cannot_take(case):
    case.network.check(SIDES[case.name])
    refused = {"vit_b_32": 32, "alexnet": 32, "squeezenet1_1": 8}
    if case.name in refused:
        with pytest.raises(UserError, match=f"{case.name} can't take images of {refused[case.name]} pixels: .+"):
            case.network.check(refused[case.name])
    assert all(value.device.type == "cpu" for value in case.network.state_dict().values())


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm:NAME, needs timm; pip install timm"):
        library_models.build("timm:resnet18", 7, "standard")


@pytest.mark.parametrize(
    "name, stem, sides",
    [
        ("resnet18", "standard", [16, 8, 4, 2]),
        ("resnet18", "small", [64, 32, 16, 8]),
        ("mobilenetv3_small_050", "small", [32, 16, 8, 4]),
        ("test_vit", "standard", []),
    ],
)
def test_timm(name, stem, sides):
    timm = pytest.importorskip("timm")
    size = 160 if name == "test_vit" else 64
    network = library_models.build(f"timm:{name}", 7, stem).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        outputs = network(images)
        assert outputs.logits.shape == (2, 7) and network.num_classes == 7
        assert [value.shape[3] for value in outputs.maps.values()] == sides
        if outputs.last_map is not None:
            assert torch.equal(network.classify(outputs.last_map), outputs.logits)
        torch.testing.assert_close(network.folded()(images).logits, outputs.logits, rtol=1e-5, atol=1e-5)
        twin = timm.create_model(name, num_classes=7).eval()
        assert list(network.state_dict()) == list(twin.state_dict())
        if stem == "standard":
            twin.load_state_dict(network.state_dict())
            torch.testing.assert_close(outputs.logits, twin(images), rtol=1e-5, atol=1e-5)
    copy.deepcopy(network).train()(images).logits.sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_timm_errors():
    pytest.importorskip("timm")
    for name, stem, message in [
        ("timm:resnet19", "standard", "there is no network timm:resnet19; did you mean timm:resnet18"),
        ("timm:hf-hub:a/b", "standard", "there is no network timm:hf-hub:a/b"),
        ("timm:test_vit", "small", "timm:test_vit has no stem for small images"),
    ]:
        with pytest.raises(UserError) as error:
            library_models.build(name, 7, stem)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_statistics_of_a_short_training_are_its_own():
    """MobileNetV3's batch norms would need thousands of steps to forget the statistics that they start with."""
    network, images = library_models.build("mobilenet_v3_small", 4, "standard"), torch.randn(8, 3, 64, 64) + 3
    with torch.no_grad():
        for _ in range(60):
            network(images)
    first = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen = network.get_submodule("features.0.0")(images).mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, seen, rtol=0.01, atol=1e-3)
