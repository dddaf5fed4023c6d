"""Attention over int8 queries and keys and e4m3 values; the plain version is in `wan.kernels.fp8`.

A flash attention (Dao et al. 2023, arXiv:2307.08691) in which queries·keys are products of int8 (SageAttention, Zhang
et al. 2024, arXiv:2410.02367), weights·values of e4m3 (SageAttention2, arXiv:2411.10958), and all else is float32.
What is done to each score takes longer than the products, so it is little: the scale of a row and that of a tile's
keys, which most have in common, are one factor of the exponent, and weights become an operand where they are.

For the latter, keys come in another order. Of each 16 columns of a product of Hopper's, Ada's or Ampere's, the threads
c = 0 … 3 that share a row hold 2c, 2c + 1, 8 + 2c and 9 + 2c; of an operand of 8 bits they hold 4c … 4c + 3 (PTX ISA,
"Matrix fragments" of mma.m16n8k32). So the keys of each 16 are read as [2, 4, 2] with strides 2, 4 and 1, and weights
as they are numbered by their threads are those of keys, and values, in order.

Where the tiles do not fill the processors evenly, `wan.waves` shares the last ones out.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wan import waves

LOG2_E = 1.4426950408889634
# A float32 between 2^23 and 2^24 has its integer in its last bits. A sum of products of int8, below 2^22 in size, that
# begins at the bits of 1.5·2^23 ends at the bits of 1.5·2^23 plus its value: read as a float it needs no conversion.
BITS, OFFSET = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)
GROUP = tl.constexpr(16)  # keys that are read in an order of their own
REGISTERS, OF_A_THREAD = 65536, 255  # that a processor of Hopper has, and a thread at most
# Queries and keys of a tile, warps, stages of loads, registers of a thread at most; by the major compute capability.
# Hopper and the Blackwell of data centres hold large tiles; on others a larger one does not fit the registers.
TILES = {9: (64, 128, 4, 3, None), 10: (128, 128, 8, 3, None), 8: (128, 32, 8, 3, None), 12: (128, 32, 8, 3, None)}


@triton.jit(do_not_specialize=["queries", "filled", "run", "groups"])
def _attention(queries_of, keys, values, query_scale, key_scale, value_scale, out, log_sums, queries, filled, run,
               groups, scale_sample_stride, scale_head_stride, factor, H: tl.constexpr, D: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr, ARE_PARTS: tl.constexpr):
    """ARE_PARTS: each sample has the same queries, and part of the keys of one; the sums are wanted too."""
    sample, head = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * M
    row = first + tl.arange(0, M)
    asking = sample * 0 if ARE_PARTS else sample  # the sample of the queries, and of the scale of values
    at = (asking.to(tl.int64) * queries + row) * H + head
    # By rows: what comes through a descriptor is held in registers as the product's operand, and where N = D Triton 3.6
    # has them overwritten after the first tile of keys.
    q = tl.load(queries_of + at[:, None] * D + tl.arange(0, D)[None, :], (row < queries)[:, None], other=0)
    row_scale = tl.load(query_scale + at, row < queries, other=1.0) * factor
    key_scale += sample.to(tl.int64) * scale_sample_stride + head * scale_head_stride
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    next_scale = tl.load(key_scale)
    border = run  # where another scale may begin
    if ARE_PARTS:
        border -= sample * filled % run
    for start in range(0, filled, N):
        k = keys.load([sample * groups + start // GROUP, 0, 0, 0, head * D]).reshape(N, D)
        sums = tl.dot(q, k.T, tl.full([M, N], BITS, tl.int32), out_dtype=tl.int32)
        scale = next_scale
        if start + N > tl.minimum(border, filled):  # some have another scale, or are no keys
            next_scale = tl.load(key_scale + tl.minimum(start + N, filled - 1))
            border += run
            # Sums in units of the largest scale: rounded to integers, where another is smaller.
            place = tl.permute(tl.reshape(start + tl.arange(0, N), [N // GROUP, 4, 2, 2]), 0, 2, 1, 3).reshape(N)
            scales = tl.load(key_scale + place, place < filled, other=0.0)
            scale = tl.max(scales, 0)
            alike = (sums.to(tl.float32, bitcast=True) - OFFSET) * (scales / scale)[None, :] + OFFSET
            sums = tl.where((place < filled)[None, :], alike, float("-inf")).to(tl.int32, bitcast=True)
        # As bits, positive floats have the order of integers, of which Hopper compares three at once.
        factors = row_scale * scale
        new_top = tl.maximum(top, (tl.max(sums, 1).to(tl.float32, bitcast=True) - OFFSET) * factors)
        # Weights of up to 448, the largest of e4m3, so that small ones are not lost; division by their sum undoes it.
        least = OFFSET * factors + new_top - 8.807354922
        weights = tl.exp2(sums.to(tl.float32, bitcast=True) * factors[:, None] - least[:, None])
        fading = tl.exp2(top - new_top)
        total = total * fading + tl.sum(weights, 1)
        top = new_top
        v = values.load([sample, head, 0, start]).reshape(D, N)
        # Not as the product's own accumulator: Hopper sums e4m3 products in about 14 bits, too few for thousands of
        # keys. It sums one tile; this sum is float32, and costs nothing beside the fading.
        in_order = tl.permute(tl.reshape(weights.to(tl.float8e4nv), [M, N // GROUP, 2, 4, 2]), 0, 1, 3, 2, 4)
        acc = acc * fading[:, None] + tl.dot(in_order.reshape(M, N), v.T)
    acc = acc * (tl.load(value_scale + asking * H + head) / total)[:, None]
    at = (sample.to(tl.int64) * queries + row) * H + head
    places = out + at[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), (row < queries)[:, None])
    if ARE_PARTS:  # log2 of the sum of the exponentials
        tl.store(log_sums + at, top + tl.log2(total) - 8.807354922, row < queries)


def attention(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor,
              run: int, dtype: torch.dtype) -> Tensor:
    batch, queries, heads, _ = q.shape
    major = torch.cuda.get_device_capability(q.device)[0]
    tile = TILES.get(major, TILES[12])
    if batch == 1 and major == 9:
        of_a_processor = REGISTERS // (32 * tile[2] * (tile[4] or OF_A_THREAD))
        first, parts = waves.shares(queries, keys.shape[1], heads, tile[0], waves.at_once(q.device, of_a_processor))
        if parts > 1:
            out = torch.empty(q.shape, dtype=dtype, device=q.device)
            _run(q[:, :first], query_scale[:, :first], keys, values, key_scale, value_scale, run, tile,
                 out[:, :first])
            some = torch.empty(parts, queries - first, *q.shape[2:], dtype=torch.float32, device=q.device)
            sums = torch.empty(*some.shape[:-1], 1, dtype=torch.float32, device=q.device)
            _run(q[:, first:], query_scale[:, first:], keys.view(parts, -1, *keys.shape[2:]),
                 values[0].unflatten(-1, (parts, -1)).permute(2, 0, 1, 3),
                 key_scale[0].unflatten(-1, (parts, -1)).transpose(0, 1), value_scale, run, tile, some, sums)
            waves.add_up(some, sums, out[:, first:], base=2)
            return out
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _run(q, query_scale, keys, values, key_scale, value_scale, run, tile, out)
    return out


def _run(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor, run: int,
         tile: tuple, out: Tensor, log_sums: Tensor | None = None) -> None:
    """Attention in one go, into `out`. Where `log_sums` [parts, S, H, 1] are given, q [1, S, H, D] attends to parts of
    the keys of one sample that follow each other, into `out` [parts, S, H, D], and log2 of the sums of the exponentials
    goes there."""
    batch, queries, heads, head_dim = out.shape
    if key_scale.stride(2) != 1:
        raise ValueError(f"scales of keys with strides {key_scale.stride()} do not follow each other")
    m, n, warps, stages, registers = tile
    in_groups, groups = _in_groups(keys, n)
    _attention[(triton.cdiv(queries, m), batch * heads)](
        q, in_groups, TensorDescriptor.from_tensor(values, [1, 1, head_dim, n]), query_scale, key_scale, value_scale,
        out, log_sums, queries, keys.shape[1], run, groups, *key_scale.stride()[:2], LOG2_E * head_dim**-0.5, H=heads,
        D=head_dim, M=m, N=n, ARE_PARTS=log_sums is not None, num_warps=warps, num_stages=stages, maxnreg=registers,
    )


def _in_groups(keys: Tensor, tile: int) -> tuple[TensorDescriptor, int]:
    """Keys [B, S, H, D] as tiles of [GROUP, H·D] groups, each in the order that is said above, and how many groups a
    sample has. What follows the last key in its group is read, whatever it is; without memory there, they are copied.
    """
    group, (batch, count, heads, head_dim) = GROUP.value, keys.shape
    row, used = heads * head_dim, triton.cdiv(count, group)
    end = keys.storage_offset() + (batch - 1) * keys.stride(0) + used * group * row
    if keys.stride()[1:] != (row, head_dim, 1) or (batch > 1 and keys.stride(0) % (group * row)) \
            or end > keys.untyped_storage().nbytes():
        keys = F.pad(keys, (0, 0, 0, 0, 0, used * group - count))
    groups = keys.stride(0) // (group * row) if batch > 1 else used
    shape, strides = [(batch - 1) * groups + used, 2, 4, 2, row], [group * row, 2 * row, 4 * row, row, 1]
    return TensorDescriptor(keys, shape, strides, [tile // group, 2, 4, 2, head_dim]), groups
