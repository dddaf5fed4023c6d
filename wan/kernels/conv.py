"""Convolutions over frames that lie channels-last, [B, T, H, W, C]: each way to do one, and which is taken."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.kernels import add_bias, fused
from wan.kernels.hopper import is_hopper

Way = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """Convolution of x [B, T, H, W, C] with weight [C', C, kt, kh, kw], plus `skip` → [B, T−kt+1, H, W, C']; rows and
    columns are padded with zeros, frames are not. Where there is a skip, there must be a bias."""
    way = HOPPER.get(tuple(weight.shape)) if fused(x, weight) and _on_hopper(x) else None
    return (way or conv3d_plain)(x, weight, bias, skip)


def conv3d_plain(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        return add_bias(conv3d_plain(x, weight, None), bias, skip)
    kh, kw = weight.shape[-2:]
    x, padding = x.permute(0, 4, 1, 2, 3), [0, kh // 2, kw // 2]
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # PyTorch takes a loop of its own, ten times as slow, for few channels (`use_mkldnn` in ATen's Convolution.cpp).
        y = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
    else:
        y = F.conv3d(x, weight, bias, padding=padding)
    return y.permute(0, 2, 3, 4, 1)


def conv3d_of_pairs(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """`conv3d` to pairs of neighbours of a row, which lie in memory as one pixel of twice the channels: a third more
    arithmetic, in products twice as wide. For filters that are 3 wide, and W even."""
    if skip is not None:
        return add_bias(conv3d_of_pairs(x, weight, None), bias, skip)
    both = torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))]).contiguous(memory_format=torch.channels_last_3d)
    bias = None if bias is None else torch.cat([bias, bias])
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), both, bias, stride=(1, 1, 2), padding=(0, weight.shape[3] // 2, 1))
    return y.permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1)).flatten(3, 4)


def conv3d_triton(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """`conv3d` by a Triton kernel, for filters of 3×3×3, C a multiple of 32 and at most 128 channels of the result."""
    from wan.kernels import triton_conv  # not before: Triton needs a GPU driver

    return triton_conv.conv3d(x, weight, bias, skip)


def conv3d_to_few(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
    """`conv3d` by a Triton kernel, for filters of 3×3×3, C a multiple of 8 and at most 4 channels of the result."""
    from wan.kernels import triton_conv_to_few

    y = triton_conv_to_few.conv3d(x, weight, bias if skip is None else None)
    return y if skip is None else add_bias(y, bias, skip)


def conv3d_of_ring(ring: Tensor, start: int, frames: int, weight: Tensor, bias: Tensor | None,
                   skip: Tensor | None = None) -> Tensor:
    """`conv3d` of so many frames, from `start` on, of ring [B, N, H, W, C], where the first frame follows the last."""
    if reads_rings(ring, weight):
        from wan.kernels import triton_conv

        return triton_conv.conv3d(ring, weight, bias, skip, start, frames)
    return conv3d(ring.roll(-start, 1)[:, :frames], weight, bias, skip)


def reads_rings(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a way to convolve frames [B, T, H, W, C] that need not follow each other in memory."""
    return fused(x, weight) and _on_hopper(x) and HOPPER.get(tuple(weight.shape)) is conv3d_triton


def _on_hopper(x: Tensor) -> bool:
    """Whether x is what the ways of HOPPER take: 16-bit numbers on a GPU of Hopper's kind."""
    return x.element_size() == 2 and is_hopper(x.device)


# The fastest way where that is not cuDNN as it comes, by the weight's shape: those of Wan's decoder at full resolution,
# for which cuDNN has only kernels of the generation before. Measured by scripts/tune_decoder.py.
HOPPER: dict[tuple[int, ...], Way] = {(96, 96, 3, 3, 3): conv3d_triton, (3, 96, 3, 3, 3): conv3d_to_few}
