"""CPU versions of fused operations, for float32 without gradients; the plain ones are in `wan.kernels`.

They make as few passes over memory as PyTorch's own operations allow, each with a long inner axis: those that broadcast
along a short one, such as 8 channels, take one number at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(1 + tanh(u))/2 = sigmoid(2u), which is quicker to compute; u = √(2/π)·(x + 0.044715·x³)."""
    y, twice = F.linear(x, weight, bias), 2 * math.sqrt(2 / math.pi)
    return y.square().mul_(0.044715 * twice).add_(twice).mul_(y).sigmoid_().mul_(y)


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    if bias is not None:
        x = _add_tiled(x, bias)
    channels, pixels = x.shape[-1], x.shape[:-1].numel()
    # Spare for all between: fresh memory is dearer than a pass over it.
    values, spare = x.reshape(pixels, channels), torch.empty(pixels, channels)
    torch.square(values, out=spare)
    inverse = (spare @ gamma.new_full((channels,), 1 / channels)).add_(eps).rsqrt_()
    # gamma times each pixel's inverse, as the product of a few pixels with a matrix of as many rows, in each gamma
    # at the pixel's place.
    few = math.gcd(pixels, 4)
    torch.mm(inverse.view(-1, few), torch.block_diag(*[gamma[None]] * few), out=spare.view(-1, few * channels))
    torch.mul(x, spare.view(x.shape), out=out)
    F.silu(out, inplace=True)


def add_bias(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return _add_tiled(x, bias).add_(skip)


def _add_tiled(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, x overwritten. x [..., W, C], bias [C]."""
    return x.flatten(-2).add_(bias.repeat(x.shape[-2])).view(x.shape)


def interleave(parts: Tensor, bias: Tensor) -> Tensor:
    n, height, width = parts.shape[0], parts.shape[1] - 1, parts.shape[2] - 1
    parts = parts.unflatten(-1, (2, 2, -1))
    out = parts.new_empty(n, height, 2, width, 2, len(bias))
    for a in (0, 1):
        for b in (0, 1):
            torch.add(parts[:, a : a + height, b : b + width, a, b], bias, out=out[:, :, a, :, b])
    return out.view(n, 2 * height, 2 * width, -1)
