"""The networks: shapes, sizes, names, stems, and that they compute what torchvision's do."""

import pytest
import torch
import torchvision
from torch import nn

import models

NETWORKS = list(models.NETWORKS)


def torchvision_twin(network):
    """torchvision's own network with the stem replaced, and the same weights."""
    twin = torchvision.models.resnet50() if isinstance(network.layer1[0].conv1, nn.Conv2d) and hasattr(
        network.layer1[0], "conv3"
    ) else torchvision.models.resnet18()  # fmt: skip
    twin.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    twin.maxpool = nn.Identity()
    twin.fc = nn.Linear(twin.fc.in_features, network.fc.out_features)
    twin.load_state_dict({key: value for key, value in network.state_dict().items() if not key.startswith("proj.")})
    return twin


@pytest.mark.parametrize("size, side", [(32, 4), (16, 2), (8, 1), (20, 3)])
def test_shapes(size, side):
    images = torch.randn(2, 3, size, size)
    for kind, channels in [("teacher", 2048), ("student", 512), ("feature_student", 512)]:
        outputs = models.build(kind, 100).eval()(images)
        assert outputs.logits.shape == (2, 100)
        assert outputs.last_map.shape == (2, channels, side, side)
        if kind == "feature_student":
            assert outputs.projected.shape == (2, 2048, side, side)


@pytest.mark.parametrize(
    "kind, expected",
    [
        # torchvision's 25,557,032 and 11,689,512 less conv1 (7x7 to 3x3) and with 100 classes for 1,000
        ("teacher", 25_557_032 - 64 * 3 * (49 - 9) - 900 * (2048 + 1)),
        ("student", 11_689_512 - 64 * 3 * (49 - 9) - 900 * (512 + 1)),
        ("feature_student", 11_689_512 - 64 * 3 * (49 - 9) - 900 * (512 + 1) + 512 * 2048 + 2048),
    ],
)
def test_parameter_counts(kind, expected):
    assert sum(parameter.numel() for parameter in models.build(kind, 100).parameters()) == expected


@pytest.mark.parametrize("kind", NETWORKS)
def test_keys_are_torchvisions(kind):
    plain = torchvision.models.resnet50() if kind == "teacher" else torchvision.models.resnet18()
    surplus = {"proj.weight", "proj.bias"} if kind == "feature_student" else set()
    assert set(models.build(kind, 10).state_dict()) == set(plain.state_dict()) | surplus


@pytest.mark.parametrize("kind", NETWORKS)
def test_stem(kind):
    network = models.build(kind, 10)
    conv1 = network.conv1
    assert (conv1.kernel_size, conv1.stride, conv1.padding, conv1.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(network.maxpool, nn.Identity)


@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_is_torchvisions(kind, scaled_like_trained):
    torch.manual_seed(0)
    network = scaled_like_trained(models.build(kind, 10))
    twin, images = torchvision_twin(network), torch.randn(3, 3, 16, 16)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(images).logits, twin.train(mode)(images))


def test_the_standard_stem_is_torchvisions_own_network():
    network, plain = models.build("student", 10, "standard").eval(), torchvision.models.resnet18(num_classes=10).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(images).logits, plain(images))


def test_shapes_are_those_of_the_outputs():
    network = models.build("feature_student", 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    shapes = models.shapes(network, 16, 7)
    outputs = network.eval()(torch.randn(2, 3, 16, 16))
    assert (shapes.classes, shapes.n_images) == (10, 7) and shapes.last_map == outputs.last_map.shape[1:] == (512, 2, 2)
    assert shapes.maps == {name: value.shape[1:] for name, value in outputs.maps.items()}
    assert shapes.maps["stage1"] == (64, 16, 16) and shapes.maps["stage4"] == (512, 2, 2)
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_projected_is_the_projection_of_the_last_map():
    network = models.build("feature_student", 10).eval()
    outputs = network(torch.randn(2, 3, 16, 16))
    expected = torch.einsum("oc,bchw->bohw", network.proj.weight[:, :, 0, 0], outputs.last_map)
    torch.testing.assert_close(outputs.projected, expected + network.proj.bias[:, None, None], rtol=1e-4, atol=1e-5)


def test_classify_is_the_networks_own_classifier():
    network = models.build("teacher", 10).eval()
    outputs = network(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(network.classify(outputs.last_map), outputs.logits)


@pytest.mark.parametrize("kind", NETWORKS)
def test_folded_computes_the_same(kind, scaled_like_trained):
    torch.manual_seed(0)
    network, images = scaled_like_trained(models.build(kind, 10)), torch.randn(4, 3, 16, 16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = models.folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images).logits, network.eval()(images).logits, rtol=1e-3, atol=1e-4)
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = models.build("feature_student", 10)(torch.randn(2, 3, 16, 16))
    assert outputs.logits.dtype == torch.float32 and outputs.last_map.dtype == torch.bfloat16


def test_weights_depend_on_the_seed_alone():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(models.build("student", 10).conv1.weight)
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
