"""The convolutions whose weights' gradient is their own: the same as nn.Conv2d's where that is right."""

import copy
import ctypes

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import models
from util.convolution import Conv, Conv3x3, replace_all, weight_gradient


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
    replace_all(mine)
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
        assert error < 0.03  # bf16 has 8 bits; seen: 0.004, and 0.007 where the CPU has none


def test_used_only_where_it_pays():
    conv = nn.Conv2d(8, 256, 3, padding=1, bias=False)
    replace_all(conv)
    small, large = torch.randn(2, 8, 4, 4).bfloat16(), torch.randn(2, 8, 4, 5).bfloat16()
    assert not own(conv(small.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert own(conv(small)) and not own(conv(large))
        with torch.no_grad():
            assert conv(small).grad_fn is None
        conv.requires_grad_(False)
        assert not own(conv(small.clone().requires_grad_()))
        few = nn.Conv2d(8, 128, 3, padding=1, bias=False)
        replace_all(few)
        assert not own(few(small))


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"groups": 2}, Conv),
        ({"bias": True}, Conv),
        ({"padding": 0}, Conv),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, Conv),
        ({"kernel_size": 1}, nn.Conv2d),
        ({"dilation": 2}, nn.Conv2d),
        ({"padding": "same"}, nn.Conv2d),
        ({"padding_mode": "reflect"}, nn.Conv2d),
    ],
)
def test_other_convolutions_have_no_gradient_of_their_own_for_3x3(options, kind):
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "bias": False, **options})
    replace_all(conv)
    assert type(conv) is kind


M_PERTURB = -6  # glibc's


@pytest.fixture
def litter():
    """litter(165) has all that is allocated full of a pattern, and not, by luck, of zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("only glibc can fill what it allocates")
    yield lambda pattern: mallopt(M_PERTURB, pattern)
    mallopt(M_PERTURB, 0)


KERNELS = [(3, 1), (5, 2), (7, 3), ((1, 7), (0, 3))]  # with their paddings
CASES = [*((*kernel, side) for kernel in KERNELS for side in (1, 2, 3, 5)), (4, 1, 2)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel, padding, side", CASES)
def test_taps_that_lie_on_the_padding_alone_have_no_gradient(litter, kernel, padding, side, stride, groups, layout):
    """Of which oneDNN leaves it uninitialised in bf16; all the rest is nn.Conv2d's."""
    litter(165)
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 128 if groups == 1 else 16, kernel, stride, padding, groups=groups)
    mine = copy.deepcopy(plain).to(memory_format=layout)
    replace_all(mine)
    images = torch.randn(4, 16, side, side)
    ours, theirs = (images.to(memory_format=layout).clone().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        output = mine(ours)
    expected = plain(theirs)
    gradient = torch.randn_like(expected)
    output.backward(gradient.to(output.dtype))
    expected.backward(gradient)
    pairs = [(output, expected), (ours.grad, theirs.grad), (mine.weight.grad, plain.weight.grad)]
    for found, right in [*pairs, (mine.bias.grad, plain.bias.grad)]:
        assert found.shape == right.shape
        assert (found.double() - right.double()).norm() < 0.03 * right.double().norm()  # as above
    assert not mine.weight.grad[plain.weight.grad == 0].any()


def test_what_memory_held_before_has_no_part_in_a_training(litter, script, small, tmp_path):
    """The weights are the same to the last bit, of a network that has such taps at 8x8 pixels."""
    found = []
    for pattern in (85, 165):
        litter(pattern)
        flags = [*small[:-1], "bf16", "--student_arch", "mobilenet_v3_small", "--epochs", 1, "--overwrite"]
        ran = script("train.py", "--model_job", "student", *flags)
        assert ran.code == 0, ran.err
        path = tmp_path / "checkpoints" / "folder" / "student_mobilenet_v3_small.pth"
        found.append(torch.load(path, weights_only=True))
    first, second = found
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_a_map_smaller_than_the_kernel_is_pytorchs_error():
    conv = nn.Conv2d(4, 4, 3, stride=2)
    replace_all(conv)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="Kernel size"):
        conv(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize("kind, convolutions", [("student", 17), ("teacher", 17)])
def test_of_networks_all_are_replaced(kind, convolutions):
    """All 3x3 ones, the stem's too: 1 + 16 of a ResNet-18's basic blocks, 1 + 16 of a ResNet-50's bottlenecks."""
    network = models.build(kind, 10)
    replace_all(network)
    assert sum(isinstance(module, Conv3x3) for module in network.modules()) == convolutions


def test_a_folded_copy_keeps_its_biases_with_gradients_on():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256))
    nn.init.constant_(network[1].bias, 3.0)
    replace_all(network)
    conv = fuse_conv_bn_eval(*network.eval())
    x = torch.randn(2, 16, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(x)
    assert not own(output)
    torch.testing.assert_close(output.float(), network(x.float()), rtol=0.05, atol=0.05)


def test_a_training_step_uses_it():
    network = models.build("student", 10).to(memory_format=torch.channels_last)
    replace_all(network)
    seen = []
    for layer in (network.layer3[1].conv2, network.layer4[1].conv2):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(own(output)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(torch.randn(2, 3, 32, 32)).logits.sum()
    loss.backward()
    assert seen == [False, True]  # 8x8, 4x4
    gradient = network.layer4[1].conv2.weight.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().sum() > 0
