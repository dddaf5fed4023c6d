"""A 3×3×3 convolution of frames that lie channels-last, to few channels; the plain version is
`wan.kernels.conv.conv3d_plain`.

A matrix product for each place of the filter, as in `wan.kernels.triton_conv`, would read each pixel 27 times, and do
little with it. Here a product has the filter's columns side by side, as if they were channels of the result, and a
program goes down the rows of a strip of the frame: each row that it reads adds to three rows of sums, one of which is
then complete. Only there the columns are shifted against each other, and added up. So a pixel is read three times, once
for each frame of the result that it is seen from.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of a strip, its columns with one more at each side, channels multiplied at a time, warps, stages of loads.
# Two programs share a processor, so that one computes while the other waits for memory.
TILE = (27, 64, 32, 4, 2)
MOST = 4  # channels of the result


@triton.jit
def _filters(weight, frame: tl.constexpr, start: tl.constexpr, C: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    """A frame of the filter for some channels, [K, 64]: 4 rows × 4 results × 4 columns, the last of each zero."""
    number, channel = tl.arange(0, 64), start + tl.arange(0, K)
    row, result, column = number // 16, number // 4 % 4, number % 4
    places = (result * 27 + frame * 9 + row * 3 + column)[None, :] * C + channel[:, None]
    mask = ((row < 3) & (result < OUT) & (column < 3))[None, :] & (channel < C)[:, None]
    return tl.load(weight + places, mask, other=0.0)


@triton.jit(do_not_specialize=["frames", "height", "width", "across"])
def _conv(x, weight, bias, out, frames, height, width, across, C: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """frames: that each video has after the convolution; across: strips beside each other. Programs that follow each
    other have the same strip of successive frames, which see mostly the same input."""
    place, frame, video = tl.program_id(0) // frames, tl.program_id(0) % frames, tl.program_id(1)
    first, left = place // across * ROWS, place % across * (COLUMNS - 2) - 1
    PIECES: tl.constexpr = (C + K - 1) // K
    filters = ()
    for f in tl.static_range(3):
        for piece in tl.static_range(PIECES):
            filters += (_filters(weight, f, piece * K, C, K, OUT),)
    pixel, result = tl.arange(0, COLUMNS), tl.arange(0, 4)
    seen = pixel[:, None] + (tl.arange(0, 16) % 4 - 1)[None, :]  # by each column of the filter
    seen = tl.minimum(tl.maximum(seen, 0), COLUMNS - 1)
    column = left + pixel
    mask = ((pixel > 0) & (pixel < COLUMNS - 1) & (column < width))[:, None] & (result < OUT)[None, :]
    added = tl.zeros([4], tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + result, result < OUT, other=0.0).to(tl.float32)
    above = tl.zeros([COLUMNS, 16], tl.float32)  # of the row of the result that lacks the row read, and no more
    here = tl.zeros([COLUMNS, 16], tl.float32)
    for row in range(first - 1, tl.minimum(first + ROWS, height) + 1):
        sums = tl.zeros([COLUMNS, 64], tl.float32)
        for f in tl.static_range(3):
            for piece in tl.static_range(PIECES):
                pixels = x.load([video * (frames + 2) + frame + f, row, left, piece * K]).reshape(COLUMNS, K)
                sums = tl.dot(pixels, filters[f * PIECES + piece], sums)
        # By the filter's rows: the first sees this row from the one below, the last from the one above.
        even, odd = tl.split(tl.permute(tl.reshape(sums, [COLUMNS, 2, 2, 16]), 0, 1, 3, 2))
        upper, lower = tl.split(tl.permute(even, 0, 2, 1))
        middle, _ = tl.split(tl.permute(odd, 0, 2, 1))
        whole = tl.sum(tl.reshape(tl.gather(above + lower, seen, 0), [COLUMNS, 4, 4]), 2) + added[None, :]
        line = ((video * frames + frame) * height + row - 1).to(tl.int64) * width
        places = out + (line + column[:, None]) * OUT + result[None, :]
        # Masked, as loads in a loop with a branch are not made ahead of time.
        tl.store(places, whole.to(out.dtype.element_ty), mask & (row > first))
        above = here + middle
        here = upper


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `wan.kernels.conv.conv3d`, for filters of 3×3×3, C a multiple of 8 and at most MOST channels of the result."""
    batch, frames, height, width, channels = x.shape
    if len(weight) > MOST or channels % 8 or frames < 3:
        raise ValueError(f"{frames} frames of {channels} channels to {len(weight)}: there must be 3 or more of a "
                         f"multiple of 8, to at most {MOST}")
    frames, (rows, columns, piece, warps, stages) = frames - 2, TILE
    x, weight = x.contiguous(), weight.contiguous(memory_format=torch.channels_last_3d)
    out = x.new_empty(batch, frames, height, width, len(weight))
    across = triton.cdiv(width, columns - 2)
    _conv[(triton.cdiv(height, rows) * across * frames, batch)](
        TensorDescriptor.from_tensor(x.flatten(0, 1), [1, 1, columns, piece]), weight, x if bias is None else bias, out,
        frames, height, width, across, C=channels, K=piece, OUT=len(weight), ROWS=rows, COLUMNS=columns,
        HAS_BIAS=bias is not None, num_warps=warps, num_stages=stages,
    )
    return out
