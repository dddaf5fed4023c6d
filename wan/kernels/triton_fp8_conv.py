"""3×3×3 convolutions of e4m3 frames, and the pass that writes such frames; the plain versions are in
`wan.kernels.fp8_conv`, which says how the frames lie.

A convolution is a matrix product for each of the nine rows of the filter. Three pixels that follow each other, which a
row of the filter sees, are one piece of memory: as a matrix, frames have a row of 3·C numbers for each position, of
which the next one shares all but C. Positions that follow each other are rows that follow each other, whatever line of
the frame they are in, for there are zeros between the lines. So a tile is a run of positions, and none is wasted.

Triton's tiles have powers of two for sizes. A tile of 192 channels is two, of 128 and 64, from the same pixels; rows of
288 numbers are two pieces of 128, and one of 32 that is multiplied by itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wan.kernels import EPS

ELEMENTS = 8192  # of a program of `norm_silu`
PIECE = tl.constexpr(64)  # channels that are written at a time: of more, the addresses would not fit into registers


class Tile(NamedTuple):
    positions: int
    channels: int
    more: int  # channels beside those
    depth: int  # numbers of each position that are multiplied at a time
    rest: int  # of those that are left over, or 0, where they are multiplied as if they were as many
    warps: int
    stages: int  # of loads


# Two programs of the first two share a processor: one computes while the other begins or ends.
WIDE = Tile(128, 128, 64, 64, 0, 4, 5)
NARROW = Tile(128, 128, 0, 128, 0, 4, 3)
FEW = Tile(256, 128, 0, 128, 32, 8, 4)  # channels


@triton.jit
def _write(sums, out, skip, scale, bias, first, pixel, inside, OUT: tl.constexpr, N: tl.constexpr,
           HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr):
    """Writes the channels from `first` on, with all that is done to them."""
    if N > PIECE:
        M: tl.constexpr = sums.shape[0]
        left, right = tl.split(tl.permute(tl.reshape(sums, [M, 2, N // 2]), 0, 2, 1))
        _write(left, out, skip, scale, bias, first, pixel, inside, OUT, N // 2, HAS_BIAS, HAS_SKIP)
        _write(right, out, skip, scale, bias, first + N // 2, pixel, inside, OUT, N // 2, HAS_BIAS, HAS_SKIP)
    else:
        channel = first + tl.arange(0, N)
        there = channel < OUT
        sums *= tl.load(scale + channel, there, other=0.0)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + channel, there, other=0.0).to(tl.float32)[None, :]
        places, mask = pixel[:, None] * OUT + channel[None, :], inside[:, None] & there[None, :]
        if HAS_SKIP:
            sums += tl.load(skip + places, mask, other=0.0).to(tl.float32)
        tl.store(out + places, sums.to(out.dtype.element_ty), mask)


@triton.jit
def _multiply(x, filters, more_filters, sums, more_sums, frame, start, ring, size, line, place, first, begin,
              STEPS: tl.constexpr, K: tl.constexpr, N: tl.constexpr, MORE: tl.constexpr):
    """Adds the products of STEPS·K numbers, from `begin` on, of each row of the filter. frame: that of the ring which
    its video begins at; size: positions of a frame; line: of a line of it."""
    for step in range(9 * STEPS):
        row, number = step // STEPS, begin + step % STEPS * K
        seen = start + row // 3
        seen = frame + tl.where(seen < ring, seen, seen - ring)
        pixels = x.load([seen * size + place + row % 3 * line, number])
        sums = tl.dot(pixels, filters.load([row, first, number]).reshape(N, K).T, sums)
        if MORE:
            more = more_filters.load([row, first + N, number]).reshape(MORE, K).T
            more_sums = tl.dot(pixels, more, more_sums)
    return sums, more_sums


@triton.jit(do_not_specialize=["frames", "height", "width", "start", "ring"])
def _conv(x, rest, filters, more_filters, rest_filters, scale, out, skip, bias, frames, height, width, start, ring,
          C: tl.constexpr, OUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MORE: tl.constexpr, K: tl.constexpr,
          REST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr):
    """frames: that each video has after the convolution. Programs that follow each other have the same positions, which
    see mostly the same input. x has `ring` frames of each video; the convolution begins at the frame `start`, and the
    first frame follows the last."""
    PARTS: tl.constexpr = (OUT + N + MORE - 1) // (N + MORE)
    part, tile, video = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS, tl.program_id(1)
    frame, place, first = tile % frames, tile // frames * M, part * (N + MORE)
    line = width + 1
    size = (height + 2) * line
    STEPS: tl.constexpr = 3 * C // K if REST else (3 * C + K - 1) // K
    sums, more_sums = tl.zeros([M, N], tl.float32), tl.zeros([M, MORE if MORE else 16], tl.float32)
    sums, more_sums = _multiply(x, filters, more_filters, sums, more_sums, video * ring, start + frame, ring, size,
                                line, place, first, 0, STEPS, K, N, MORE)
    if REST:
        sums, more_sums = _multiply(rest, rest_filters, rest_filters, sums, more_sums, video * ring, start + frame,
                                    ring, size, line, place, first, STEPS * K, 1, REST, N, 0)
    position = place + tl.arange(0, M)
    row, column = position // line, position % line
    pixel, inside = row * width + column, (row < height) & (column < width)
    before = (video * frames + frame).to(tl.int64) * height * width * OUT
    _write(sums, out + before, skip + before, scale, bias, first, pixel, inside, OUT, N, HAS_BIAS, HAS_SKIP)
    if MORE:
        _write(more_sums, out + before, skip + before, scale, bias, first + N, pixel, inside, OUT, MORE, HAS_BIAS,
               HAS_SKIP)


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def _norm_silu(x, gamma, bias, out, positions, height, width, steps, eps, C: tl.constexpr, BLOCK_C: tl.constexpr,
               ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Goes through all positions of `out`, for it writes the zeros between lines, too."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line, column = position // (width + 1), position % (width + 1)
    frame, row = line // (height + 2), line % (height + 2)
    inside = (position < positions) & (column > 0) & (row > 0) & (row <= height)
    pixel = (frame * height + row - 1) * width + column - 1
    channel = tl.arange(0, BLOCK_C)
    some = channel < C
    places = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x + places, inside[:, None] & some[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, some, other=0.0).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    inverse = tl.where(inside, inverse, 0.0)
    value = value * inverse[:, None] * tl.load(gamma + channel, some, other=0.0).to(tl.float32)[None, :]
    half = 0.5 * value
    value = (half + half * _tanh(half)) * steps  # x·sigmoid(x), with one instruction where that would take two
    places = position.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + places, value.to(out.dtype.element_ty), (position < positions)[:, None] & some[None, :])


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, steps: float, out: Tensor) -> None:
    """As `wan.kernels.fp8_conv.norm_silu_e4m3`."""
    height, width, channels = x.shape[2:]
    block = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // block)
    for part, target in zip(x.contiguous(), out, strict=True):  # `out` may be a slice of each video's frames
        if not target.is_contiguous():
            raise ValueError(f"frames of strides {target.stride()} are not in one piece")
        positions = target.numel() // channels
        _norm_silu[(triton.cdiv(positions, rows),)](
            part, gamma, gamma if bias is None else bias, target, positions, height, width, steps, EPS, C=channels,
            BLOCK_C=block, ROWS=rows, HAS_BIAS=bias is not None, num_warps=4,
        )


def _tile(positions: int, channels: int, results: int, device: torch.device) -> Tile:
    """Where tiles are few, the width that leaves fewer processors idle in the end."""
    if 3 * channels % FEW.depth == FEW.rest and results <= FEW.channels:
        return FEW
    places = 2 * torch.cuda.get_device_properties(device).multi_processor_count

    def cost(tile: Tile) -> int:
        columns = tile.channels + tile.more
        return columns * triton.cdiv(triton.cdiv(positions, tile.positions) * triton.cdiv(results, columns), places)

    return min(WIDE, NARROW, key=cost)


def conv3d(ring: Tensor, start: int, frames: int, filters: Tensor, scale: Tensor, bias: Tensor | None,
           skip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `wan.kernels.fp8_conv.conv3d_e4m3`; filters and scale are those of its Filters."""
    batch, size, lines, line, channels = ring.shape
    if not (0 <= start < size and 2 < frames <= size):
        raise ValueError(f"{frames} frames from {start} on are not in a ring of {size}, or too few for a filter of 3")
    if not ring.is_contiguous() or channels % 16:
        raise ValueError(f"frames {list(ring.shape)} of strides {ring.stride()} are not in one piece, or of channels "
                         f"that are no multiple of 16")
    frames, height, width, results = frames - 2, lines - 2, line - 1, len(scale)
    out = torch.empty(batch, frames, height, width, results, dtype=dtype, device=ring.device)
    skip = out if skip is None else skip.contiguous()
    positions = height * line
    tile = _tile(positions * frames * batch, channels, results, ring.device)
    parts = triton.cdiv(results, tile.channels + tile.more)

    def pixels(depth: int) -> TensorDescriptor:
        """Rows of three pixels, each of which begins a pixel after the one before it."""
        return TensorDescriptor(ring, [batch * size * lines * line - 2, 3 * channels], [channels, 1],
                                [tile.positions, depth])

    def rows(columns: int, depth: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(filters, [1, columns, depth])

    _conv[(triton.cdiv(positions, tile.positions) * frames * parts, batch)](
        pixels(tile.depth), pixels(tile.rest or tile.depth), rows(tile.channels, tile.depth),
        rows(tile.more or tile.channels, tile.depth), rows(tile.channels, tile.rest or tile.depth), scale, out, skip,
        scale if bias is None else bias, frames, height, width, start, size, C=channels, OUT=results, M=tile.positions,
        N=tile.channels, MORE=tile.more, K=tile.depth, REST=tile.rest, HAS_BIAS=bias is not None,
        HAS_SKIP=skip is not out, num_warps=tile.warps, num_stages=tile.stages,
    )
    return out
