"""Attention over int8 queries and keys and e4m3 values; the plain version is in `wan.kernels.fp8`.

A flash attention (Dao et al. 2023, arXiv:2307.08691) in which queries·keys are products of int8 (SageAttention, Zhang
et al. 2024, arXiv:2410.02367), weights·values of e4m3 (SageAttention2, arXiv:2411.10958), and all else is float32. A
row's scale is a factor of the exponent, the values' of the result; only that of the keys multiplies a tile of scores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
# Queries and keys of a tile, warps, stages of loads, registers of a thread at most; by the major compute capability.
# Hopper and the Blackwell of data centres hold large tiles; on others a larger one does not fit the registers.
TILES = {9: (64, 128, 4, 3, None), 10: (128, 128, 8, 3, None), 8: (128, 32, 8, 3, None), 12: (128, 32, 8, 3, None)}


@triton.jit
def _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, start, filled, D: tl.constexpr,
          N: tl.constexpr, MASKED: tl.constexpr):
    """Takes the keys `start …` into the running sums of weights·values, of weights, and the largest exponent."""
    place = start + tl.arange(0, N)
    key_scales = tl.load(key_scale + place, place < filled, other=0.0) if MASKED else tl.load(key_scale + place)
    k = keys.load([sample, start, head, 0]).reshape(N, D)
    scores = tl.dot(q, k.T).to(tl.float32) * key_scales[None, :]
    if MASKED:
        scores = tl.where((place < filled)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    # Weights of up to 448, the largest of e4m3, so that small ones are not lost; the division by their sum undoes it.
    weights = tl.exp2(scores * scale[:, None] - (new_top - 8.807354922)[:, None])
    fading = tl.exp2(top - new_top)
    total = total * fading + tl.sum(weights, 1)
    v = values.load([sample, head, 0, start]).reshape(D, N)
    # Not as the product's own accumulator: Hopper sums e4m3 products in about 14 bits, too few for thousands of keys.
    # It sums one tile; this sum is float32, and costs nothing beside the fading.
    acc = acc * fading[:, None] + tl.dot(weights.to(tl.float8e4nv), v.T)
    return acc, total, new_top


@triton.jit(do_not_specialize=["queries", "filled"])
def _attention(queries_of, keys, values, query_scale, key_scale, value_scale, out, queries, filled,
               scale_sample_stride, scale_head_stride, factor, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
               N: tl.constexpr):
    sample, head = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * M
    row = first + tl.arange(0, M)
    at = (sample.to(tl.int64) * queries + row) * H + head
    q = queries_of.load([sample, first, head, 0]).reshape(M, D)
    scale = tl.load(query_scale + at, row < queries, other=1.0) * factor
    key_scale += sample.to(tl.int64) * scale_sample_stride + head * scale_head_stride
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    whole = filled // N * N
    for start in range(0, whole, N):
        acc, total, top = _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, start, filled, D, N,
                                False)
    if whole < filled:
        acc, total, top = _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, whole, filled, D, N,
                                True)
    acc = acc * (tl.load(value_scale + sample * H + head) / total)[:, None]
    places = out + at[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), (row < queries)[:, None])


def attention(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor,
              dtype: torch.dtype) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    if key_scale.stride(2) != 1:
        raise ValueError(f"scales of keys with strides {key_scale.stride()} do not follow each other")
    m, n, warps, stages, registers = TILES.get(torch.cuda.get_device_capability(q.device)[0], TILES[12])
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _attention[(triton.cdiv(queries, m), batch * heads)](
        TensorDescriptor.from_tensor(q, [1, m, 1, head_dim]), TensorDescriptor.from_tensor(keys, [1, n, 1, head_dim]),
        TensorDescriptor.from_tensor(values, [1, 1, head_dim, n]), query_scale, key_scale, value_scale, out, queries,
        keys.shape[1], *key_scale.stride()[:2], LOG2_E * head_dim**-0.5, H=heads, D=head_dim, M=m, N=n,
        num_warps=warps, num_stages=stages, maxnreg=registers,
    )
    return out
