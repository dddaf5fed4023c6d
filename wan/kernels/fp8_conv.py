"""3×3×3 convolutions of 8 bits: of SiLU(norm(x)), in e4m3 with one scale, and filters in e4m3 with a scale for each
channel of the result. On a GPU these are Triton kernels; the plain versions beside them round in the same places and
compute in float32.

The frames lie channels-last with zeros around them, [B, T, H+2, W+1, C]: a line above, one below, and a column at the
left, which is at the right of the line before, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wan.kernels import norm_silu_plain
from wan.kernels.conv import conv3d_plain
from wan.kernels.fp8 import E4M3, LARGEST, scale_of, to_e4m3


class Filters(NamedTuple):
    """Of a convolution's weight [C', C, 3, 3, 3]: values·scale, for frames that are divided by their steps."""

    values: Tensor  # e4m3 [9, C', 3·C]: its rows, of each frame
    scale: Tensor  # float32 [C']


def room(x: Tensor, frames: int) -> Tensor:
    """Memory for so many frames like those of x [B, any, H, W, C]."""
    batch, _, height, width, channels = x.shape
    return torch.empty(batch, frames, height + 2, width + 1, channels, dtype=E4M3, device=x.device)


def inner(frames: Tensor) -> Tensor:
    """[B, T, H+2, W+1, C] → the frames without the zeros [B, T, H, W, C], a view."""
    return frames[:, :, 1:-1, 1:]


def steps_for(gamma: Tensor) -> float:
    """What SiLU(norm(x)·gamma) can be multiplied by without leaving e4m3, whatever x is: the norm makes no number
    larger than √C. As e4m3 is a floating-point format, what is small is rounded no worse for it."""
    return LARGEST / max(gamma.numel() ** 0.5 * gamma.abs().max().item(), 1e-6)


def filters_of(weight: Tensor, steps: float) -> Filters:
    """weight [C', C, 3, 3, 3]; steps: what the frames were multiplied by."""
    scale = scale_of(weight, (1, 2, 3, 4))
    rows = (weight.float() / scale).permute(2, 3, 0, 4, 1).flatten(0, 1).flatten(-2)
    return Filters(to_e4m3(rows).contiguous(), scale.flatten() / steps)


def norm_silu_e4m3(x: Tensor, gamma: Tensor, bias: Tensor | None, steps: float, out: Tensor) -> None:
    """out ← SiLU(RMSNorm(x + bias)·gamma)·steps, in e4m3, over the last axis. x [B, T, H, W, C], contiguous; gamma and
    bias [C]; out [B, T, H+2, W+1, C], a slice of `room` where there is one video."""
    if x.is_cuda:
        from wan.kernels import triton_fp8_conv  # not before: Triton needs a GPU driver

        triton_fp8_conv.norm_silu(x, gamma, bias, steps, out)
    else:
        norm_silu_e4m3_plain(x, gamma, bias, steps, out)


def norm_silu_e4m3_plain(x: Tensor, gamma: Tensor, bias: Tensor | None, steps: float, out: Tensor) -> None:
    out.zero_()
    inner(out).copy_(to_e4m3(norm_silu_plain(x, gamma, bias) * steps))


def conv3d_e4m3(ring: Tensor, start: int, frames: int, filters: Filters, bias: Tensor | None, skip: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    """Convolution, plus bias and skip, of so many frames, from `start` on, of ring [B, N, H+2, W+1, C], where the first
    frame follows the last → [B, frames−2, H, W, C'] in dtype. Where there is a skip, there must be a bias. On a GPU C
    must be a multiple of 16, C' of 8."""
    if ring.is_cuda:
        from wan.kernels import triton_fp8_conv

        return triton_fp8_conv.conv3d(ring, start, frames, *filters, bias, skip, dtype)
    return conv3d_e4m3_plain(ring, start, frames, filters, bias, skip, dtype)


def conv3d_e4m3_plain(ring: Tensor, start: int, frames: int, filters: Filters, bias: Tensor | None,
                      skip: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = filters.values.float() * filters.scale[:, None]
    weight = rows.unflatten(0, (3, 3)).unflatten(-1, (3, -1)).permute(2, 4, 0, 1, 3)
    bias, skip = (None if added is None else added.float() for added in (bias, skip))
    return conv3d_plain(inner(ring).float().roll(-start, 1)[:, :frames], weight, bias, skip).to(dtype)
