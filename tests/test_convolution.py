"""The 3x3 convolution with a weights' gradient of its own: the same as nn.Conv2d's, and used only where it pays."""

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import models
from util.convolution import Conv3x3, weight_gradient


def own(layer_output: torch.Tensor) -> bool:
    return "_Convolution" in type(layer_output.grad_fn).__name__


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 3), (4, 4), (5, 3), (8, 8)])
def test_weight_gradient_is_autograds(height, width, stride):
    x = torch.randn(3, 5, height, width, dtype=torch.float64)
    conv = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=False).double()
    output = conv(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    mine = weight_gradient(x, gradient, stride)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), conv.weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_gradients_are_conv2ds(stride):
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 256, 3, stride=stride, padding=1, bias=False)
    mine = nn.Conv2d(16, 256, 3, stride=stride, padding=1, bias=False)
    mine.load_state_dict(plain.state_dict())
    Conv3x3.replace_all(mine)
    x = torch.randn(4, 16, 4, 4).to(memory_format=torch.channels_last)
    results = []
    for conv in (plain, mine):
        images = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = conv(images.to(torch.bfloat16))
        assert own(output) == (conv is mine)
        output.float().square().sum().backward()
        results.append((output, images.grad, conv.weight.grad))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.dtype == ours.dtype and theirs.shape == ours.shape
        error = (theirs.double() - ours.double()).norm() / theirs.double().norm()
        assert error < 0.01  # bf16 has 8 bits


def test_used_only_where_it_pays():
    conv = nn.Conv2d(8, 256, 3, padding=1, bias=False)
    Conv3x3.replace_all(conv)
    small, large = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 5).bfloat16()
    assert not own(conv(small.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert own(conv(small)) and not own(conv(large))
        with torch.no_grad():
            assert conv(small).grad_fn is None
        conv.requires_grad_(False)
        assert not own(conv(small.clone().requires_grad_()))
        few = nn.Conv2d(8, 128, 3, padding=1, bias=False)
        Conv3x3.replace_all(few)
        assert not own(few(small))


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"dilation": 2}, {"bias": True}, {"padding": 0}, {"kernel_size": 1}, {"padding_mode": "reflect"}],
)
def test_other_convolutions_are_left_alone(options):
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "bias": False, **options})
    Conv3x3.replace_all(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("kind, convolutions", [("student", 17), ("teacher", 17)])
def test_of_networks_all_are_replaced(kind, convolutions):
    """All 3x3 ones, the stem's too: 1 + 16 of a ResNet-18's basic blocks, 1 + 16 of a ResNet-50's bottlenecks."""
    network = models.build(kind, 10)
    Conv3x3.replace_all(network)
    assert sum(isinstance(module, Conv3x3) for module in network.modules()) == convolutions


def test_a_folded_copy_keeps_its_biases_with_gradients_on():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256))
    nn.init.constant_(network[1].bias, 3.0)
    Conv3x3.replace_all(network)
    conv = fuse_conv_bn_eval(*network.eval())
    x = torch.randn(2, 16, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(x)
    assert not own(output)
    torch.testing.assert_close(output.float(), network(x.float()), rtol=0.05, atol=0.05)


def test_a_training_step_uses_it():
    network = models.build("student", 10).to(memory_format=torch.channels_last)
    Conv3x3.replace_all(network)
    seen = []
    for layer in (network.layer3[1].conv2, network.layer4[1].conv2):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(own(output)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(torch.randn(2, 3, 32, 32)).logits.sum()
    loss.backward()
    assert seen == [False, True]  # 8x8, 4x4
    gradient = network.layer4[1].conv2.weight.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().sum() > 0
