"""Attention in bfloat16 or float16 for Hopper, in Gluon; the plain version is `wan.attention.pytorchs`.

As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), a program is several groups of four warps with 64 queries
each and one warp that loads keys and values for them all, so that while some weigh scores another's products run. A
group waits for each product of its own: so little is held in registers that there is room for three. (On an H200 this
took less time than two groups that ask for the next scores first, and than groups that take turns.)

A program attends with one tile of queries of a head after another. Those that do not fill the processors evenly are
shared out to parts of the keys, which `wan.waves` adds up. Keys come from the last to the first: only the first tile
that is read may have room for more of them than there are.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wan import waves
from wan.kernels.gluon_pieces import (
    KEYS,
    LOAD,
    OF_LOADER,
    REGISTERS,
    ROWS,
    TILE,
    WARP_GROUPS,
    piece_of,
    sum_by_threads,
    times,
)

STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory


@gluon.jit
def _load(keys, values, keys_at, values_at, keys_full, keys_free, values_full, values_free, tiles, whole, parts, filled,
          H: gl.constexpr, D: gl.constexpr):
    i = 0
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, _, _, begin, end = piece_of(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
        for back in range(begin, end):
            start = (end - 1 - (back - begin)) * KEYS
            stage, phase = i % STAGES, i // STAGES & 1
            mbarrier.wait(keys_free.index(stage), phase ^ 1)
            mbarrier.expect(keys_full.index(stage), 2 * KEYS * D)
            LOAD(keys, [start, head, 0], keys_full.index(stage), keys_at.index(stage))
            mbarrier.wait(values_free.index(stage), phase ^ 1)
            mbarrier.expect(values_full.index(stage), 2 * KEYS * D)
            LOAD(values, [start, head, 0], values_full.index(stage), values_at.index(stage))
            i += 1


@gluon.jit
def _max(scores):
    """Of each row of [ROWS, KEYS], by pairs: one after another, each would wait for the one before."""
    pairs = gl.max(gl.max(gl.max(scores.reshape([ROWS, KEYS // 16, 2, 4, 2]), 4), 2), 1)
    return gl.convert_layout(gl.max(pairs, 1), gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def _attend(WHICH: gl.constexpr, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, queries_of,
            out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor,
            H: gl.constexpr, D: gl.constexpr):
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # of queries and keys
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])  # queries
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    DTYPE: gl.constexpr = queries_of.dtype.element_ty
    no_sums, nothing = gl.zeros([ROWS, KEYS], gl.float32, SUMS), gl.zeros([ROWS, D], gl.float32, OUT)
    q = q_at.index(WHICH)
    i = 0
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, tile, part, begin, end = piece_of(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
        row = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, READ))
        places = queries_of + head * head_stride + row[:, None] * query_stride
        q.store(gl.load(places + gl.arange(0, D, gl.SliceLayout(0, READ))[None, :], (row < queries)[:, None], other=0))
        fence_async_shared()
        top = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        total = sum_by_threads(no_sums)
        acc = nothing
        for back in range(begin, end):
            stage, phase = i % STAGES, i // STAGES & 1
            i += 1
            mbarrier.wait(keys_full.index(stage), phase)
            k, v = keys_at.index(stage).reshape([KEYS, D]), values_at.index(stage).reshape([KEYS, D])
            sums = warpgroup_mma(q, k.permute([1, 0]), no_sums, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(keys_free.index(stage))
            if back == begin:  # some may be no keys
                place = (end - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SUMS))
                scores = gl.where((place < filled)[None, :], scores, float("-inf"))
            new_top = gl.maximum(top, _max(scores) * factor)
            weights = gl.exp2(scores * factor - new_top[:, None])
            fading = gl.exp2(top - new_top)
            total = times(total, fading) + sum_by_threads(weights)
            top = new_top
            acc = times(acc, fading)
            weights = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
            mbarrier.wait(values_full.index(stage), phase)
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(values_free.index(stage))

        total = gl.convert_layout(gl.sum(total, 1), BY_ROW)
        acc = times(acc, 1 / total)
        row = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, BY_ROW)
        row_of_out = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
        channel = gl.arange(0, D, gl.SliceLayout(0, OUT))[None, :]
        inside = (row_of_out < queries)[:, None]
        if index < whole * H:
            gl.store(out + (row_of_out * H + head)[:, None] * D + channel, acc.to(DTYPE), inside)
        else:  # of part of the keys, and log2 of the sum of the exponentials
            before = part * (queries - whole * TILE) - whole * TILE
            gl.store(some + ((before + row_of_out) * H + head)[:, None] * D + channel, acc, inside)
            gl.store(log_sums + (before + row) * H + head, top + gl.log2(total), row < queries)


@gluon.jit(do_not_specialize=["queries", "tiles", "whole", "parts", "filled"])
def _attention(queries_of, keys, values, out, some, log_sums, queries, tiles, whole, parts, filled, query_stride,
               head_stride, factor, H: gl.constexpr, D: gl.constexpr):
    keys_at = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, 1, D], keys.layout)
    values_at = gl.allocate_shared_memory(values.dtype, [STAGES, KEYS, 1, D], values.layout)
    q_at = gl.allocate_shared_memory(keys.dtype, [WARP_GROUPS, ROWS, D],
                                     gl.NVMMASharedLayout.get_default_for([ROWS, D], keys.dtype))
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=WARP_GROUPS)
        mbarrier.init(values_full.index(i), count=1)
        mbarrier.init(values_free.index(i), count=WARP_GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_attend, (0, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, queries_of, out, some,
                   log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H, D)),
        (_attend, (1, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, queries_of, out, some,
                   log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H, D)),
        (_attend, (2, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, queries_of, out, some,
                   log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H, D)),
        (_load, (keys, values, keys_at, values_at, keys_full, keys_free, values_full, values_free, tiles, whole, parts,
                 filled, H, D)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, OF_LOADER])


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [1, Sq, H, D], keys and values [1, Sk, H, D], all with channels that follow each other → [1, Sq, H, D]."""
    _, queries, heads, head_dim = q.shape
    count, tile, processors = keys.shape[1], TILE.value, waves.at_once(q.device, 1)
    tiles, key_tiles = triton.cdiv(queries, tile), triton.cdiv(count, KEYS.value)
    first, parts = waves.shares(queries, count, heads, tile, processors, even=False)
    whole, parts = triton.cdiv(first, tile), min(parts, key_tiles)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    some = sums = torch.empty(0, dtype=torch.float32, device=q.device)  # not written where nothing is shared out
    if parts > 1:
        some = torch.empty(parts, queries - first, heads, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(*some.shape[:-1], 1, dtype=torch.float32, device=q.device)
    _attention[(min(processors, (whole + (tiles - whole) * parts) * heads),)](
        q, _tiles(keys), _tiles(values), out, some, sums, queries, tiles, whole, parts, count, q.stride(1), q.stride(2),
        math.log2(math.e) * head_dim**-0.5, H=heads, D=head_dim, num_warps=4)
    if parts > 1:
        waves.add_up(some, sums, out[:, first:], base=2)
    return out


def _tiles(x: Tensor) -> TensorDescriptor:
    """[1, S, H, D] in tiles of KEYS of one head."""
    _, count, heads, head_dim = x.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    block = [KEYS.value, 1, head_dim]
    return TensorDescriptor(x, [count, heads, head_dim], [x.stride(1), x.stride(2), 1], block,
                            gl.NVMMASharedLayout.get_default_for(block, dtype))
