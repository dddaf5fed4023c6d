"""A 3×3×3 convolution of frames that lie channels-last; the plain version is `wan.kernels.conv.conv3d_plain`.

It is a matrix product for each of the 27 places of the filter: of that place's weights and of a run of pixels of one
row, shifted by the place. The GPU's copy engine fetches the runs, and zeros where they reach beyond the frame.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of a tile (1 or 2), pixels of each, channels that are multiplied at a time, warps, stages of loads.
TILE = (2, 128, 32, 8, 6)


@triton.jit
def _finish(sums, out, skip, bias, frame, row, column, N: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr):
    """Writes a run of pixels, with all that is added to it."""
    if HAS_BIAS:
        channel = tl.arange(0, N)
        sums += tl.load(bias + channel, channel < OUT, other=0.0).to(tl.float32)[None, :]
    if HAS_SKIP:
        sums += skip.load([frame, row, column, 0]).reshape(COLUMNS, N).to(tl.float32)
    out.store([frame, row, column, 0], sums.to(out.dtype).reshape(1, 1, COLUMNS, N))


@triton.jit(do_not_specialize=["frames", "across", "start", "ring"])
def _conv(x, weight, out, skip, bias, frames, across, start, ring, C: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
          OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
          HAS_SKIP: tl.constexpr):
    """frames: that each video has after the convolution; across: tiles beside each other. Programs that follow each
    other have the same pixels of successive frames, which see mostly the same input. x has `ring` frames of each video;
    the convolution begins at the frame `start`, and the first frame follows the last."""
    place, frame, video = tl.program_id(0) // frames, tl.program_id(0) % frames, tl.program_id(1)
    row, column = place // across * ROWS, place % across * COLUMNS
    upper = tl.zeros([COLUMNS, N], tl.float32)
    lower = tl.zeros([COLUMNS, N], tl.float32)
    for step in range(27 * (C // K)):
        tap, channel = step // (C // K), step % (C // K) * K
        f, r, c = start + frame + tap // 9, row + tap // 3 % 3 - 1, column + tap % 3 - 1
        f = video * ring + tl.where(f < ring, f, f - ring)
        filters = weight.load([tap, 0, channel]).reshape(N, K).T
        upper = tl.dot(x.load([f, r, c, channel]).reshape(COLUMNS, K), filters, upper)
        if ROWS == 2:
            lower = tl.dot(x.load([f, r + 1, c, channel]).reshape(COLUMNS, K), filters, lower)
    frame += video * frames
    _finish(upper, out, skip, bias, frame, row, column, N, OUT, COLUMNS, HAS_BIAS, HAS_SKIP)
    if ROWS == 2:
        _finish(lower, out, skip, bias, frame, row + 1, column, N, OUT, COLUMNS, HAS_BIAS, HAS_SKIP)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None = None, start: int = 0,
           frames: int | None = None) -> Tensor:
    """As `wan.kernels.conv.conv3d_of_ring`, for filters of 3×3×3; C a multiple of 32, at most 128 channels of the
    result. All frames where none are named."""
    batch, ring, height, width, channels = x.shape
    frames = ring if frames is None else frames
    if not (0 <= start < ring and 2 < frames <= ring):
        raise ValueError(f"{frames} frames from {start} on are not in a ring of {ring}, or too few for a filter of 3")
    rows, columns, piece, warps, stages = TILE
    x, filters = x.contiguous(), weight.contiguous(memory_format=torch.channels_last_3d)
    filters = filters.permute(2, 3, 4, 0, 1).flatten(0, 2)  # [27, C', C], a view
    # The copy engine wants pixels of 16 bytes or a multiple.
    out = x.new_empty(batch, frames - 2, height, width, -(-len(weight) // 8) * 8)
    skip = out if skip is None else skip.contiguous()
    across, block = triton.cdiv(width, columns), max(16, triton.next_power_of_2(len(weight)))
    _conv[(triton.cdiv(height, rows) * across * (frames - 2), batch)](
        TensorDescriptor.from_tensor(x.flatten(0, 1), [1, 1, columns, piece]),
        TensorDescriptor.from_tensor(filters, [1, block, piece]),
        *(TensorDescriptor.from_tensor(tensor.flatten(0, 1), [1, 1, columns, block]) for tensor in (out, skip)),
        x if bias is None else bias, frames - 2, across, start, ring, C=channels, K=piece, N=block, OUT=len(weight),
        ROWS=rows, COLUMNS=columns, HAS_BIAS=bias is not None, HAS_SKIP=skip is not out, num_warps=warps,
        num_stages=stages,
    )
    return out[..., : len(weight)]
