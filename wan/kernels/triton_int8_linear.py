"""Linear layers of int8 rows; the plain version is in `wan.kernels.fp8`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows, outputs and inputs of a tile, warps, stages of loads; by the major compute capability.
TILES = {9: (128, 128, 128, 4, 3), 10: (128, 128, 128, 8, 4), 8: (128, 128, 64, 8, 3), 12: (128, 128, 64, 8, 3)}
TOGETHER = 8  # tiles of rows that go through the outputs side by side, so that they find the weights in the L2 cache


@triton.jit(do_not_specialize=["rows"])
def _linear(x, weight, x_scale, weight_scale, bias, out, rows, C: tl.constexpr, OUTPUTS: tl.constexpr, M: tl.constexpr,
            N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr):
    tiles_of_rows, tiles_of_outputs = tl.cdiv(rows, M), tl.cdiv(OUTPUTS, N)
    group = tl.program_id(0) // (TOGETHER * tiles_of_outputs) * TOGETHER
    width = tl.minimum(tiles_of_rows - group, TOGETHER)
    within = tl.program_id(0) % (TOGETHER * tiles_of_outputs)
    first_row, first_output = (group + within % width) * M, within // width * N
    acc = tl.zeros([M, N], tl.int32)
    for start in range(0, C, K):  # beyond C there are zeros
        acc = tl.dot(x.load([first_row, start]), weight.load([first_output, start]).T, acc, out_dtype=tl.int32)
    row, output = first_row + tl.arange(0, M), first_output + tl.arange(0, N)
    scale = tl.load(weight_scale + output, output < OUTPUTS, other=0.0)
    shift = tl.load(bias + output, output < OUTPUTS, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * tl.load(x_scale + row, row < rows, other=0.0)[:, None] * scale[None, :] + shift[None, :]
    places = out + row.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(places, y.to(out.dtype.element_ty), (row < rows)[:, None] & (output < OUTPUTS)[None, :])


def linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    *shape, inputs = x.shape
    x, outputs = x.reshape(-1, inputs), len(weight)
    rows = len(x)
    m, n, k, warps, stages = TILES.get(torch.cuda.get_device_capability(x.device)[0], TILES[12])
    out = torch.empty(*shape, outputs, dtype=bias.dtype, device=x.device)
    _linear[(triton.cdiv(rows, m) * triton.cdiv(outputs, n),)](
        TensorDescriptor.from_tensor(x, [m, k]), TensorDescriptor.from_tensor(weight, [n, k]), x_scale, weight_scale,
        bias, out, rows, C=inputs, OUTPUTS=outputs, M=m, N=n, K=k, TOGETHER=TOGETHER, num_warps=warps,
        num_stages=stages,
    )
    return out
