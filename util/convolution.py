"""Convolutions that a CPU, in bf16, trains rightly over maps smaller than their kernels, and fast over small ones."""

import torch
import torch.nn.functional as F
from torch import nn

# Where the gradient below was measured to be faster than oneDNN's: with many channels, 1.2x at 4x4, 4x at 2x2.
CHANNELS = 256
PIXELS = 4 * 4


def replace_all(network: nn.Module) -> None:
    """Make each of the network's nn.Conv2d one that trains as it should on a CPU in bf16.

    The outputs and the gradients are nn.Conv2d's, up to rounding. Elsewhere (other devices and precisions, inference)
    they are nn.Conv2d itself.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            # The class alone changes, so weights and hooks stay, and no random numbers are drawn.
            module.__class__ = Conv3x3 if _is_3x3(module) else Conv


class Conv(nn.Conv2d):
    """An nn.Conv2d with the right gradient where some of its kernel's taps lie on the padding for every output.

    Of such taps' weights oneDNN leaves the gradient as that memory was (seen with PyTorch 2.14, over maps of 1x1, and
    of 2x2 with kernels of 7x7). Here the kernel is cut to the others, so that it is 0.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (_touching(x.shape[2 + i], *self._sides(i)) for i in (0, 1))
        whole = all(taps == range(size) for taps, size in zip((rows, columns), self.kernel_size, strict=True))
        if whole or not self._trains_in_bf16(x):
            return super().forward(x)
        kernel = self.weight[:, :, rows.start : rows.stop, columns.start : columns.stop]
        padding = (self.padding[0] - rows.start, self.padding[1] - columns.start)
        return F.conv2d(x, kernel, self.bias, self.stride, padding, groups=self.groups)

    def _sides(self, axis: int) -> tuple[int, int, int]:
        return self.kernel_size[axis], self.stride[axis], self.padding[axis]

    def _trains_in_bf16(self, x: torch.Tensor) -> bool:
        in_bf16 = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return in_bf16 and self.weight.requires_grad and torch.is_grad_enabled()


def _touching(pixels: int, taps: int, stride: int, padding: int) -> range:
    """Along one side, the taps that lie on the image for some output; all, where others can't be left away."""
    outputs = (pixels + 2 * padding - taps) // stride + 1
    first, end = max(0, padding - (outputs - 1) * stride), min(taps, pixels + padding)
    left = (pixels + 2 * (padding - first) - (end - first)) // stride + 1
    return range(first, end) if left == outputs > 0 else range(taps)


def _is_plain(conv: nn.Conv2d) -> bool:
    known = conv.dilation == (1, 1) and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
    return known and conv.kernel_size != (1, 1)


def _is_3x3(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.bias is None and conv.kernel_size == (3, 3) and conv.padding == (1, 1)
    return plain and conv.stride[0] == conv.stride[1]


class Conv3x3(Conv):
    """An nn.Conv2d(kernel_size=3, padding=1, bias=False) whose weights' gradient is fast over small maps, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._pays(x):
            return _Convolution.apply(x, self.weight, self.stride[0])
        return super().forward(x)

    def _pays(self, x: torch.Tensor) -> bool:
        pixels = -(-x.shape[2] // self.stride[0]) * -(-x.shape[3] // self.stride[0])
        in_bf16 = x.dtype == torch.bfloat16 and self._trains_in_bf16(x)
        # Its bias is None when a convolution is made one of these; folding a batch norm into it gives it one.
        return self.bias is None and in_bf16 and pixels <= PIXELS and self.out_channels >= CHANNELS


class _Convolution(torch.autograd.Function):
    """The convolution of x (B, C, H, W) with float32 weights (D, C, 3, 3), computed in x's precision."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        kernel = weight.to(x.dtype)
        ctx.save_for_backward(x, kernel)
        ctx.stride = stride
        return F.conv2d(x, kernel, stride=stride, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        x, kernel = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.nn.grad.conv2d_input(x.shape, kernel, gradient, ctx.stride, padding=1)
        return of_x, weight_gradient(x, gradient, ctx.stride), None


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, stride: int) -> torch.Tensor:
    """The gradient, float32 (D, C, 3, 3), of the weights of a 3x3 convolution with padding 1.

    x: its input (B, C, H, W); gradient: that of its output (B, D, H', W'). For each of the nine taps it is the product
    of two matrices, (D, n) and (n, C), where n counts the output pixels whose tap lies on the image: none of the
    padding is multiplied, which at 4x4 is 31 % of the nine taps' pixels and at 2x2 56 %.
    """
    images, gradients = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    result = x.new_zeros(gradient.shape[1], x.shape[1], 3, 3, dtype=torch.float32)
    result = result.contiguous(memory_format=torch.channels_last)
    for i in range(3):
        rows, image_rows = _inside(i, images.shape[1], gradients.shape[1], stride)
        for j in range(3):
            columns, image_columns = _inside(j, images.shape[2], gradients.shape[2], stride)
            outputs = gradients[:, rows, columns].flatten(0, 2)
            inputs = images[:, image_rows, image_columns].flatten(0, 2)
            result[:, :, i, j] = outputs.t() @ inputs
    return result


def _inside(tap: int, size: int, outputs: int, stride: int) -> tuple[slice, slice]:
    """Along one side, the outputs whose tap (0, 1, 2) lies on the image, and the pixels that it lies on there."""
    first = 1 if tap == 0 else 0
    end = min(outputs, (size - tap) // stride + 1)
    return slice(first, end), slice(first * stride + tap - 1, (end - 1) * stride + tap, stride)
