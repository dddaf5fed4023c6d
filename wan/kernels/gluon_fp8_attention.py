"""Attention over int8 queries and keys and e4m3 values for Hopper, in Gluon; the plain version is in
`wan.kernels.fp8`, and what is computed is told in `wan.kernels.triton_fp8_attention`: the same, in the same order.

There, a program is one group of four warps, which waits for each of its products, and two fit a processor: the tensor
cores are idle most of the time, and each program reads all keys and values. Here, as in FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608), a program is three such groups with 64 queries each and one warp that loads keys and values
for them all, so that while some wait or weigh scores another's product runs. For a third group there are registers,
160 a thread, as nothing but the sums of outputs outlives a tile of keys.

A program attends with one tile of queries of a head after another. Those that do not fill the processors evenly are
shared out to parts of the keys, which `wan.waves` adds up.
"""

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
from wan.kernels import triton_fp8_attention as by_tiles
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

BITS, OFFSET = gl.constexpr(by_tiles.BITS.value), gl.constexpr(by_tiles.OFFSET.value)
GROUP = gl.constexpr(by_tiles.GROUP.value)  # keys that are read in an order of their own
LOG2_LARGEST = gl.constexpr(8.807354922)  # of e4m3
STAGES = gl.constexpr(4)  # tiles of keys and values in shared memory


@gluon.jit
def _load(keys, values, keys_at, values_at, full, free, tiles, whole, parts, filled, H: gl.constexpr, D: gl.constexpr):
    i = 0
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, _, _, begin, end = piece_of(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
        for tile in range(begin, end):
            stage = i % STAGES
            mbarrier.wait(free.index(stage), i // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * KEYS * D)
            LOAD(keys, [tile * (KEYS // GROUP), 0, 0, 0, head * D], full.index(stage), keys_at.index(stage))
            LOAD(values, [0, head, 0, tile * KEYS], full.index(stage), values_at.index(stage))
            i += 1


@gluon.jit
def _by_one_scale(sums, key_scale, next_scale, border, start, filled, run, SUMS: gl.constexpr):
    """Sums of a tile [ROWS, KEYS] as floats, each with OFFSET, and their maxima without; the scale of the keys, that at
    the next tile, and where another may begin."""
    scores, scale = sums.to(gl.float32, bitcast=True), next_scale
    most = gl.max(sums, 1).to(gl.float32, bitcast=True) - OFFSET
    if start + KEYS > gl.minimum(border, filled):  # some have another scale, or are no keys
        next_scale = gl.load(key_scale + gl.minimum(start + KEYS, filled - 1))
        other = gl.load(key_scale + gl.minimum(border, filled - 1))
        column = gl.arange(0, KEYS, gl.SliceLayout(0, SUMS))
        place = start + (column & -16) + (column >> 1 & 3) * 4 + (column >> 3 & 1) * 2 + (column & 1)
        larger = gl.maximum(scale, other)
        scores = (scores - OFFSET) * gl.where(place < border, scale / larger, other / larger)[None, :]
        scores = gl.where((place < filled)[None, :], scores, float("-inf"))
        most, scale = gl.max(scores, 1), larger
        scores += OFFSET
        border += run
    return scores, most, scale, next_scale, border


@gluon.jit
def _operand(weights, OUT: gl.constexpr):
    """Of a product in the layout OUT, in e4m3. Because of the order of keys, no thread gives another anything."""
    weights = weights.to(gl.float8e4nv).reshape([ROWS, KEYS // GROUP, 2, 4, 2]).permute(0, 1, 3, 2, 4)
    return gl.convert_layout(weights.reshape([ROWS, KEYS]), gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)


@gluon.jit
def _attend(WHICH: gl.constexpr, q_at, keys_at, values_at, full, free, queries_of, query_scale, key_scales, value_scale,
            out, some, log_sums, queries, tiles, whole, parts, filled, run, scale_stride, factor, H: gl.constexpr,
            D: gl.constexpr):
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])  # of queries and keys
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    READ: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // D, D // 16], [4, 1], [1, 0])  # queries
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    bits, nothing = gl.full([ROWS, KEYS], BITS, gl.int32, SUMS), gl.zeros([ROWS, D], gl.float32, OUT)
    q = q_at.index(WHICH)
    i = 0
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, tile, part, begin, end = piece_of(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
        row = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, READ))
        places = queries_of + (row * H + head)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, READ))[None, :]
        q.store(gl.load(places, (row < queries)[:, None], other=0))
        fence_async_shared()
        row = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, BY_ROW)
        row_scale = gl.load(query_scale + row * H + head, row < queries, other=1.0) * factor
        key_scale = key_scales + head * scale_stride
        top = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        total = sum_by_threads(gl.zeros([ROWS, KEYS], gl.float32, SUMS))
        acc = nothing
        border = (begin * KEYS // run + 1) * run
        next_scale = gl.load(key_scale + begin * KEYS)
        for start in range(begin * KEYS, end * KEYS, KEYS):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            i += 1
            k, v = keys_at.index(stage).reshape([KEYS, D]), values_at.index(stage).reshape([D, KEYS])
            sums = warpgroup_mma(q, k.permute([1, 0]), bits, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            scores, most, scale, next_scale, border = _by_one_scale(sums, key_scale, next_scale, border, start, filled,
                                                                    run, SUMS)
            factors = row_scale * scale
            new_top = gl.maximum(top, most * factors)
            least = OFFSET * factors + new_top - LOG2_LARGEST
            weights = gl.exp2(scores * factors[:, None] - least[:, None])
            fading = gl.exp2(top - new_top)
            total = times(total, fading) + sum_by_threads(weights)
            top = new_top
            product = warpgroup_mma(_operand(weights, OUT), v.permute([1, 0]), nothing, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(free.index(stage))
            acc = times(acc, fading) + product

        total = gl.convert_layout(gl.sum(total, 1), BY_ROW)
        acc = times(acc, gl.load(value_scale + head) / total)
        row_of_out = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
        channel = gl.arange(0, D, gl.SliceLayout(0, OUT))[None, :]
        inside = (row_of_out < queries)[:, None]
        if index < whole * H:
            gl.store(out + (row_of_out * H + head)[:, None] * D + channel, acc.to(out.dtype.element_ty), inside)
        else:  # of part of the keys, and log2 of the sum of the exponentials
            before = part * (queries - whole * TILE) - whole * TILE
            gl.store(some + ((before + row_of_out) * H + head)[:, None] * D + channel, acc, inside)
            gl.store(log_sums + (before + row) * H + head, top + gl.log2(total) - LOG2_LARGEST, row < queries)


@gluon.jit(do_not_specialize=["queries", "tiles", "whole", "parts", "filled", "run", "scale_stride"])
def _attention(queries_of, keys, values, query_scale, key_scales, value_scale, out, some, log_sums, queries, tiles,
               whole, parts, filled, run, scale_stride, factor, H: gl.constexpr, D: gl.constexpr):
    keys_at = gl.allocate_shared_memory(gl.int8, [STAGES, KEYS // GROUP, 2, 4, 2, D], keys.layout)
    values_at = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, 1, D, KEYS], values.layout)
    q_at = gl.allocate_shared_memory(gl.int8, [WARP_GROUPS, ROWS, D],
                                     gl.NVMMASharedLayout.get_default_for([ROWS, D], gl.int8))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=WARP_GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_attend, (0, q_at, keys_at, values_at, full, free, queries_of, query_scale, key_scales, value_scale, out, some,
                   log_sums, queries, tiles, whole, parts, filled, run, scale_stride, factor, H, D)),
        (_attend, (1, q_at, keys_at, values_at, full, free, queries_of, query_scale, key_scales, value_scale, out, some,
                   log_sums, queries, tiles, whole, parts, filled, run, scale_stride, factor, H, D)),
        (_attend, (2, q_at, keys_at, values_at, full, free, queries_of, query_scale, key_scales, value_scale, out, some,
                   log_sums, queries, tiles, whole, parts, filled, run, scale_stride, factor, H, D)),
        (_load, (keys, values, keys_at, values_at, full, free, tiles, whole, parts, filled, H, D)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, OF_LOADER])


def attention(q: Tensor, query_scale: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor,
              run: int, dtype: torch.dtype) -> Tensor:
    """Rows of queries [1, Sq, H, D] and what is `Held` of keys, in which a scale is that of `run` ≥ KEYS of them, → [1,
    Sq, H, D] in dtype."""
    _, queries, heads, head_dim = q.shape
    if key_scale.stride(2) != 1:
        raise ValueError(f"scales of keys with strides {key_scale.stride()} do not follow each other")
    count, tile, processors = keys.shape[1], TILE.value, waves.at_once(q.device, 1)
    tiles, key_tiles = triton.cdiv(queries, tile), triton.cdiv(count, KEYS.value)
    first, parts = waves.shares(queries, count, heads, tile, processors, even=False)
    whole, parts = triton.cdiv(first, tile), min(parts, key_tiles)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    some = sums = query_scale  # where nothing is shared out they are not written
    if parts > 1:
        some = torch.empty(parts, queries - first, heads, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(*some.shape[:-1], 1, dtype=torch.float32, device=q.device)
    _attention[(min(processors, (whole + (tiles - whole) * parts) * heads),)](
        q, *_descriptors(keys, values), query_scale, key_scale, value_scale, out, some, sums, queries, tiles, whole,
        parts, count, run, key_scale.stride(1), by_tiles.LOG2_E * head_dim**-0.5, H=heads, D=head_dim, num_warps=4)
    if parts > 1:
        waves.add_up(some, sums, out[:, first:], base=2)
    return out


def _descriptors(keys: Tensor, values: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of tiles [KEYS / GROUP, 2, 4, 2, D] of keys and [1, 1, D, KEYS] of values."""
    groups, _ = by_tiles._in_groups(keys, KEYS.value)
    tile = [1, 1, values.shape[2], KEYS.value]
    return (
        TensorDescriptor(groups.base, groups.shape, groups.strides, groups.block_shape,
                         gl.NVMMASharedLayout.get_default_for(groups.block_shape, gl.int8)),
        TensorDescriptor(values, list(values.shape), list(values.stride()), tile,
                         gl.NVMMASharedLayout.get_default_for(tile, gl.float8e4nv)),
    )
