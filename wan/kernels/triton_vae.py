"""Triton versions of the element-wise parts of the VAE decoder; the plain ones are in `wan.kernels`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels import EPS

ELEMENTS = 4096  # per program


@triton.jit
def _norm_silu(x, gamma, bias, out, rows, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
               HAS_BIAS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    mask = (row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * C + channel[None, :]
    value = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, inside, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    value = value * scale[:, None] * tl.load(gamma + channel, inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask)


@triton.jit
def _add_bias(x, bias, skip, count, C: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    value = tl.load(x + offsets, mask).to(tl.float32) + tl.load(skip + offsets, mask).to(tl.float32)
    value += tl.load(bias + offsets % C, mask).to(tl.float32)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask)


@triton.jit
def _twice(x, out, width, C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # of the input, over all frames
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK_C)
    mask = (column < width)[:, None] & (channel < C)[None, :]
    value = tl.load(x + (row * width + column)[:, None] * C + channel[None, :], mask)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            to = ((2 * row + dy) * 2 * width + 2 * column + dx)[:, None] * C + channel[None, :]
            tl.store(out + to, value, mask)


@triton.jit
def _interleave(parts, bias, out, height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # of half the size, over all frames
    frame, y = row // height, row % height
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK_C)
    mask = (x < width)[:, None] & (channel < C)[None, :]
    added = tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            entry = (frame * (height + 1) + y + a) * (width + 1) + x + b
            value = tl.load(parts + entry[:, None] * (4 * C) + (2 * a + b) * C + channel[None, :], mask).to(tl.float32)
            to = ((2 * row + a) * 2 * width + 2 * x + b)[:, None] * C + channel[None, :]
            tl.store(out + to, (value + added).to(out.dtype.element_ty), mask)


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    rows_each = max(1, ELEMENTS // block)
    for part, target in zip(x, out, strict=True):  # `out` may be a slice of each video's frames
        rows = part.numel() // channels
        _norm_silu[(triton.cdiv(rows, rows_each),)](
            _contiguous(part), gamma, gamma if bias is None else bias, _checked(target), rows, EPS, C=channels,
            BLOCK_C=block, ROWS=rows_each, HAS_BIAS=bias is not None, num_warps=4,
        )


def add_bias(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    x = _contiguous(x)
    block = 2048
    _add_bias[(triton.cdiv(x.numel(), block),)](x, bias, _contiguous(skip), x.numel(), C=x.shape[-1], BLOCK=block)
    return x


def twice(x: Tensor) -> Tensor:
    x, (n, height, width, channels) = _contiguous(x), x.shape
    out = x.new_empty(n, 2 * height, 2 * width, channels)
    block = triton.next_power_of_2(channels)
    pixels = max(1, ELEMENTS // block)
    _twice[(n * height, triton.cdiv(width, pixels))](x, out, width, C=channels, BLOCK_C=block, PIXELS=pixels)
    return out


def interleave(parts: Tensor, bias: Tensor) -> Tensor:
    """The last step of `conv2d_of_twice`: parts [N, H+1, W+1, 4·C] of `folded_conv2d` → [N, 2H, 2W, C]."""
    parts, (n, height, width, _) = _contiguous(parts), parts.shape
    height, width, channels = height - 1, width - 1, len(bias)
    out = parts.new_empty(n, 2 * height, 2 * width, channels)
    block = triton.next_power_of_2(channels)
    pixels = max(1, ELEMENTS // block)
    _interleave[(n * height, triton.cdiv(width, pixels))](parts, bias, out, height, width, C=channels, BLOCK_C=block,
                                                          PIXELS=pixels)
    return out


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format)


def _checked(out: Tensor) -> Tensor:
    if not out.is_contiguous():
        raise ValueError(f"out of shape {list(out.shape)} must be contiguous, its strides are {out.stride()}")
    return out
