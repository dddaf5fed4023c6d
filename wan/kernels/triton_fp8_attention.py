"""Attention over int8 queries and keys and e4m3 values; the plain version is in `wan.kernels.fp8`.

A flash attention (Dao et al. 2023, arXiv:2307.08691) in which queries·keys are products of int8 (SageAttention, Zhang
et al. 2024, arXiv:2410.02367), weights·values of e4m3 (SageAttention2, arXiv:2411.10958), and all else is float32. A
row's scale is a factor of the exponent, the values' of the result; only that of the keys multiplies a tile of scores.
Where the tiles do not fill the processors evenly, `wan.waves` shares the last ones out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wan import waves

LOG2_E = 1.4426950408889634
# A float32 between 2^23 and 2^24 has its integer in its last bits. A sum of products of int8, below 2^22 in size, that
# begins at the bits of 1.5·2^23 ends at the bits of 1.5·2^23 plus its value: read as a float it needs no conversion.
BITS, OFFSET = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)
HOPPER_TILES = 2  # that a processor of Hopper computes at a time
# Queries and keys of a tile, warps, stages of loads, registers of a thread at most; by the major compute capability.
# Hopper and the Blackwell of data centres hold large tiles; on others a larger one does not fit the registers.
TILES = {9: (64, 128, 4, 3, None), 10: (128, 128, 8, 3, None), 8: (128, 32, 8, 3, None), 12: (128, 32, 8, 3, None)}


@triton.jit
def _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, start, filled, D: tl.constexpr,
          M: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """Takes the keys `start …` into the running sums of weights·values, of weights, and the largest exponent."""
    place = start + tl.arange(0, N)
    key_scales = tl.load(key_scale + place, place < filled, other=0.0) if MASKED else tl.load(key_scale + place)
    k = keys.load([sample, start, head, 0]).reshape(N, D)
    sums = tl.dot(q, k.T, tl.full([M, N], BITS, tl.int32), out_dtype=tl.int32)
    scores = sums.to(tl.float32, bitcast=True) * key_scales[None, :] - (key_scales * OFFSET)[None, :]
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
def _attention(queries_of, keys, values, query_scale, key_scale, value_scale, out, log_sums, queries, filled,
               scale_sample_stride, scale_head_stride, factor, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
               N: tl.constexpr, WANT_SUMS: tl.constexpr):
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
        acc, total, top = _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, start, filled, D, M,
                                N, False)
    if whole < filled:
        acc, total, top = _tile(acc, total, top, q, scale, keys, key_scale, values, sample, head, whole, filled, D, M,
                                N, True)
    acc = acc * (tl.load(value_scale + sample * H + head) / total)[:, None]
    places = out + at[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), (row < queries)[:, None])
    if WANT_SUMS:  # log2 of the sum of the exponentials
        tl.store(log_sums + at, top + tl.log2(total) - 8.807354922, row < queries)


def attention(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor,
              dtype: torch.dtype) -> Tensor:
    batch, queries, heads, _ = q.shape
    major = torch.cuda.get_device_capability(q.device)[0]
    tile = TILES.get(major, TILES[12])
    if batch == 1 and major == 9:
        first, parts = waves.shares(queries, keys.shape[1], heads, tile[0], waves.at_once(q.device, HOPPER_TILES))
        if parts > 1:
            out = torch.empty(q.shape, dtype=dtype, device=q.device)
            _run(q[:, :first], query_scale[:, :first], keys, values, key_scale, value_scale, tile, out[:, :first])
            rest, rest_scale = (waves.several(x[:, first:], parts) for x in (q, query_scale))
            some = torch.empty(rest.shape, dtype=torch.float32, device=q.device)
            sums = torch.empty(*rest.shape[:-1], 1, dtype=torch.float32, device=q.device)
            _run(rest, rest_scale, keys.view(parts, -1, *keys.shape[2:]),
                 values[0].unflatten(-1, (parts, -1)).permute(2, 0, 1, 3),
                 key_scale[0].unflatten(-1, (parts, -1)).transpose(0, 1), waves.several(value_scale, parts), tile, some,
                 sums)
            out[:, first:] = waves.add_up(some, sums / LOG2_E)
            return out
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _run(q, query_scale, keys, values, key_scale, value_scale, tile, out)
    return out


def _run(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor,
         tile: tuple, out: Tensor, log_sums: Tensor | None = None) -> None:
    """Attention in one go, into `out` and, where it is given, `log_sums` [B, S, H, 1]: log2 of the sums of the
    exponentials."""
    batch, queries, heads, head_dim = q.shape
    if key_scale.stride(2) != 1:
        raise ValueError(f"scales of keys with strides {key_scale.stride()} do not follow each other")
    m, n, warps, stages, registers = tile
    _attention[(triton.cdiv(queries, m), batch * heads)](
        TensorDescriptor.from_tensor(q, [1, m, 1, head_dim]), TensorDescriptor.from_tensor(keys, [1, n, 1, head_dim]),
        TensorDescriptor.from_tensor(values, [1, 1, head_dim, n]), query_scale, key_scale, value_scale, out, log_sums,
        queries, keys.shape[1], *key_scale.stride()[:2], LOG2_E * head_dim**-0.5, H=heads, D=head_dim, M=m, N=n,
        WANT_SUMS=log_sums is not None, num_warps=warps, num_stages=stages, maxnreg=registers,
    )
