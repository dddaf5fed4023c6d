"""Attention in bfloat16 or float16 for Hopper, in Gluon; the plain version is `wan.attention.in_one_go`.

As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), a program is several groups of four warps with 64 queries
each and one warp that loads keys and values for them all, so that while some weigh scores another's products run. Two
ways to order a group's work can be chosen:

- it waits for each product of its own (AHEAD false): little is held in registers, and there is room for a third group;
- it asks for the scores of a tile of keys together with the weighted values of the tile before, and weighs the former
  while the latter run (AHEAD): two groups.

Groups that begin together also end together and leave the tensor cores idle in between; with TURNS they ask for
products one after another.

Which of them is fastest is for scripts to find; `WAY` is taken.

A program attends with one tile of queries of a head after another. Those that do not fill the processors evenly are
shared out to parts of the keys, which `wan.waves` adds up. Keys come from the last to the first: only the first tile
that is read may have room for more of them than there are.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from wan import waves

LOAD = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as later and earlier Tritons call it
ROWS = gl.constexpr(64)  # queries of a group of warps
SLACK = gl.constexpr(8.0)  # log2 of how large a weight may become before sums are scaled anew, where that is rare
OF_LOADER = gl.constexpr(24)  # registers of a thread of the warp that loads


class Way(NamedTuple):
    """How the kernel goes about it."""

    groups: int  # of warps; 2 or 3
    keys: int  # of a tile
    stages: int  # tiles of keys, and of values, in shared memory
    ahead: bool = False
    turns: int = 0  # one after another ask for 1: scores, and with AHEAD values; 2: either; 3: values and next scores
    rare: bool = False  # sums are only scaled where a maximum rose by much
    late: bool = False  # keys are given back together with values

    @property
    def registers(self) -> int:
        """Of a thread."""
        return {2: 240, 3: 160}[self.groups]


WAY = Way(groups=3, keys=64, stages=4, ahead=True)


@gluon.jit
def _piece(index, tiles, whole, parts, key_tiles, H: gl.constexpr):
    """The head, the tile of queries, the part of the keys, and its tiles, from one to before another, of a piece of
    work. The first `whole` tiles of queries attend to all keys, the others to `parts` of them."""
    part, count = index * 0, index * 0 + 1
    if index < whole * H:
        head, tile = index // whole, index % whole
    else:
        rest = index - whole * H
        part, count = rest % parts, parts
        head, tile = rest // parts // (tiles - whole), whole + rest // parts % (tiles - whole)
    return head, tile, part, part * key_tiles // count, (part + 1) * key_tiles // count


@gluon.jit
def _load(keys, values, keys_at, values_at, keys_full, keys_free, values_full, values_free, tiles, whole, parts, filled,
          H: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    i = 0
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, _, _, begin, end = _piece(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
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
def _masked(scores, start, filled, KEYS: gl.constexpr):
    """Without what are no keys."""
    place = start + gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
    return gl.where((place < filled)[None, :], scores, float("-inf"))


@gluon.jit
def _sum_by_threads(weights, KEYS: gl.constexpr):
    """[ROWS, KEYS] → [ROWS, 4]: what the four threads that share a row have of it. They need not meet in each tile."""
    return gl.sum(gl.sum(weights.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def _max(scores, KEYS: gl.constexpr):
    """Of each row of [ROWS, KEYS], by pairs: one after another, each would wait for the one before."""
    pairs = gl.max(gl.max(gl.max(scores.reshape([ROWS, KEYS // 16, 2, 4, 2]), 4), 2), 1)
    return gl.convert_layout(gl.max(pairs, 1), gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def _settled(total):
    """total [ROWS, 4] as it is; what it is made of is computed before products are waited for after this: the compiler
    would put it behind the wait."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; .reg .b32 at; mov.b32 at, 0; setp.lt.f32 never, $1, 0f00000000; "
        "@never st.shared.f32 [at], $1; mov.b32 $0, $1; }", "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _times(x, by_row):
    """x [ROWS, n] · by_row [ROWS], which any thread has for the rows that it has of x."""
    return x * gl.convert_layout(by_row, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _weigh(scores, top, total, factor, KEYS: gl.constexpr, RARE: gl.constexpr):
    """Weights of scores, what older sums are to be multiplied by, the maxima and the sums with these."""
    most = _max(scores, KEYS) * factor
    new_top = gl.where(most > top + SLACK, most, top) if RARE else gl.maximum(top, most)
    weights = gl.exp2(scores * factor - new_top[:, None])
    fading = gl.exp2(top - new_top)
    total = _times(total, fading) + _sum_by_threads(weights, KEYS)
    return weights, fading, new_top, total


@gluon.jit
def _rose(fading, RARE: gl.constexpr):
    """Whether any maximum of the group did."""
    if RARE:
        return gl.min(fading, 0) < 1
    else:
        return True


@gluon.jit
def _faded(acc, fading, rose, RARE: gl.constexpr):
    if RARE:
        if rose:
            acc = _times(acc, fading)
    else:
        acc = _times(acc, fading)
    return acc


@gluon.jit
def _packed(weights, KEYS: gl.constexpr, DTYPE: gl.constexpr):
    """As pairs, int32 [ROWS, KEYS / 2]: two numbers of 16 bits would be put together anew where the compiler begins
    another block of instructions."""
    even, odd = gl.split(weights.reshape([ROWS, KEYS // 2, 2]))
    BOTH: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if DTYPE.name == "bf16" else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(BOTH, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _operand(packed, OUT: gl.constexpr, KEYS: gl.constexpr, DTYPE: gl.constexpr):
    """Of a product in the layout OUT. No thread gives another anything."""
    weights = gl.join((packed & 0xFFFF).to(gl.uint16), (packed >> 16 & 0xFFFF).to(gl.uint16)).reshape([ROWS, KEYS])
    return gl.convert_layout(weights.to(DTYPE, bitcast=True), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def _attend(WHICH: gl.constexpr, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn,
            queries_of, out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor,
            H: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
            AHEAD: gl.constexpr, TURNS: gl.constexpr, RARE: gl.constexpr,
            LATE: gl.constexpr):
    TILE: gl.constexpr = ROWS * GROUPS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # of queries and keys
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    READ: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])  # queries
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    DTYPE: gl.constexpr = queries_of.dtype.element_ty
    no_sums, nothing = gl.zeros([ROWS, KEYS], gl.float32, SUMS), gl.zeros([ROWS, D], gl.float32, OUT)
    q = q_at.index(WHICH)
    i = 0
    turns = i
    for index in range(gl.program_id(0), (whole + (tiles - whole) * parts) * H, gl.num_programs(0)):
        head, tile, part, begin, end = _piece(index, tiles, whole, parts, gl.cdiv(filled, KEYS), H)
        row = tile * TILE + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, READ))
        places = queries_of + head * head_stride + row[:, None] * query_stride
        q.store(gl.load(places + gl.arange(0, D, gl.SliceLayout(0, READ))[None, :], (row < queries)[:, None], other=0))
        fence_async_shared()
        top = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        total = _sum_by_threads(no_sums, KEYS)
        acc = nothing
        if AHEAD:
            stage = i % STAGES
            mbarrier.wait(keys_full.index(stage), i // STAGES & 1)
            sums = warpgroup_mma(q, keys_at.index(stage).reshape([KEYS, D]).permute([1, 0]), no_sums, use_acc=False,
                                 is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(keys_free.index(stage))
            scores = _masked(sums, (end - 1) * KEYS, filled, KEYS)
            weights, fading, top, total = _weigh(scores, top, total, factor, KEYS, RARE)
            packed = _packed(weights, KEYS, DTYPE)
            for _ in range(begin + 1, end):
                before, stage, phase = i % STAGES, (i + 1) % STAGES, (i + 1) // STAGES & 1
                mbarrier.wait(keys_full.index(stage), phase)
                mbarrier.wait(values_full.index(before), i // STAGES & 1)
                if TURNS:
                    mbarrier.wait(turn.index(WHICH), turns & 1 ^ (1 if WHICH == 0 else 0))
                    turns += 1
                p = _operand(packed, OUT, KEYS, DTYPE)
                sums = warpgroup_mma(q, keys_at.index(stage).reshape([KEYS, D]).permute([1, 0]), no_sums,
                                     use_acc=False, is_async=True)
                acc = warpgroup_mma(p, values_at.index(before).reshape([KEYS, D]), acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turn.index((WHICH + 1) % GROUPS))
                sums = warpgroup_mma_wait(1, deps=[sums])
                if not LATE:
                    mbarrier.arrive(keys_free.index(stage))
                weights, fading, top, total = _weigh(sums, top, total, factor, KEYS, RARE)
                total = _settled(total)
                rose = _rose(fading, RARE)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                packed = _packed(weights, KEYS, DTYPE)
                mbarrier.arrive(values_free.index(before))
                if LATE:
                    mbarrier.arrive(keys_free.index(stage))
                acc = _faded(acc, fading, rose, RARE)
                i += 1
            stage = i % STAGES
            mbarrier.wait(values_full.index(stage), i // STAGES & 1)
            acc = warpgroup_mma(_operand(packed, OUT, KEYS, DTYPE), values_at.index(stage).reshape([KEYS, D]), acc,
                                is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(values_free.index(stage))
            i += 1
        else:
            for back in range(begin, end):
                stage, phase = i % STAGES, i // STAGES & 1
                i += 1
                mbarrier.wait(keys_full.index(stage), phase)
                if TURNS == 1:
                    mbarrier.wait(turn.index(WHICH), turns & 1 ^ (1 if WHICH == 0 else 0))
                if TURNS == 2:
                    mbarrier.wait(turn.index(WHICH), turns & 1 ^ (1 if WHICH < 2 else 0))
                sums = warpgroup_mma(q, keys_at.index(stage).reshape([KEYS, D]).permute([1, 0]), no_sums,
                                     use_acc=False, is_async=True)
                if TURNS == 1:
                    mbarrier.arrive(turn.index((WHICH + 1) % GROUPS))
                if TURNS == 2:
                    mbarrier.arrive(turn.index(3 + (WHICH + 2) % 3))
                if TURNS == 3:
                    mbarrier.arrive(turn.index((WHICH + 1) % GROUPS), pred=back > begin)
                scores = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(keys_free.index(stage))
                if back == begin:
                    scores = _masked(scores, (end - 1) * KEYS, filled, KEYS)
                weights, fading, top, total = _weigh(scores, top, total, factor, KEYS, RARE)
                acc = _faded(acc, fading, _rose(fading, RARE), RARE)
                p = gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
                mbarrier.wait(values_full.index(stage), phase)
                if TURNS == 2:
                    mbarrier.wait(turn.index(3 + WHICH), turns & 1 ^ (1 if WHICH == 2 else 0))
                if TURNS == 3:
                    mbarrier.wait(turn.index(WHICH), turns & 1 ^ (1 if WHICH == 0 else 0))
                acc = warpgroup_mma(p, values_at.index(stage).reshape([KEYS, D]), acc, is_async=True)
                if TURNS == 2:
                    mbarrier.arrive(turn.index((WHICH + 2) % 3))
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(values_free.index(stage))
                turns += 1
            if TURNS == 3:
                mbarrier.arrive(turn.index((WHICH + 1) % GROUPS))

        total = gl.convert_layout(gl.sum(total, 1), BY_ROW)
        acc = _times(acc, 1 / total)
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
    if TURNS == 2 and WHICH == 0:
        mbarrier.arrive(turn.index(5))


@gluon.jit(do_not_specialize=["queries", "tiles", "whole", "parts", "filled"])
def _attention(queries_of, keys, values, out, some, log_sums, queries, tiles, whole, parts, filled, query_stride,
               head_stride, factor, H: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, KEYS: gl.constexpr,
               STAGES: gl.constexpr, AHEAD: gl.constexpr, TURNS: gl.constexpr, RARE: gl.constexpr,
               LATE: gl.constexpr, REGISTERS: gl.constexpr):
    keys_at = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, 1, D], keys.layout)
    values_at = gl.allocate_shared_memory(values.dtype, [STAGES, KEYS, 1, D], values.layout)
    q_at = gl.allocate_shared_memory(keys.dtype, [GROUPS, ROWS, D],
                                     gl.NVMMASharedLayout.get_default_for([ROWS, D], keys.dtype))
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=GROUPS)
        mbarrier.init(values_full.index(i), count=1)
        mbarrier.init(values_free.index(i), count=GROUPS)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_attend, (0, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn, queries_of,
                       out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H,
                       D, GROUPS, KEYS, STAGES, AHEAD, TURNS, RARE, LATE)),
            (_attend, (1, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn, queries_of,
                       out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H,
                       D, GROUPS, KEYS, STAGES, AHEAD, TURNS, RARE, LATE)),
            (_load, (keys, values, keys_at, values_at, keys_full, keys_free, values_full, values_free, tiles, whole,
                     parts, filled, H, D, KEYS, STAGES)),
        ], [4, 1], [REGISTERS, OF_LOADER])
    else:
        gl.warp_specialize([
            (_attend, (0, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn, queries_of,
                       out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H,
                       D, GROUPS, KEYS, STAGES, AHEAD, TURNS, RARE, LATE)),
            (_attend, (1, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn, queries_of,
                       out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H,
                       D, GROUPS, KEYS, STAGES, AHEAD, TURNS, RARE, LATE)),
            (_attend, (2, q_at, keys_at, values_at, keys_full, keys_free, values_full, values_free, turn, queries_of,
                       out, some, log_sums, queries, tiles, whole, parts, filled, query_stride, head_stride, factor, H,
                       D, GROUPS, KEYS, STAGES, AHEAD, TURNS, RARE, LATE)),
            (_load, (keys, values, keys_at, values_at, keys_full, keys_free, values_full, values_free, tiles, whole,
                     parts, filled, H, D, KEYS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, OF_LOADER])


def attention(q: Tensor, keys: Tensor, values: Tensor, way: Way = WAY) -> Tensor:
    """q [1, Sq, H, D], keys and values [1, Sk, H, D], all with channels that follow each other → [1, Sq, H, D]."""
    _, queries, heads, head_dim = q.shape
    count, tile, processors = keys.shape[1], way.groups * ROWS.value, waves.at_once(q.device, 1)
    tiles, key_tiles = triton.cdiv(queries, tile), triton.cdiv(count, way.keys)
    first, parts = waves.shares(queries, count, heads, tile, processors, even=False)
    whole, parts = triton.cdiv(first, tile), min(parts, key_tiles)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    some = sums = torch.empty(0, dtype=torch.float32, device=q.device)  # not written where nothing is shared out
    if parts > 1:
        some = torch.empty(parts, queries - first, heads, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(*some.shape[:-1], 1, dtype=torch.float32, device=q.device)
    _attention[(min(processors, (whole + (tiles - whole) * parts) * heads),)](
        q, _tiles(keys, way.keys), _tiles(values, way.keys), out, some, sums, queries, tiles, whole, parts, count,
        q.stride(1), q.stride(2), math.log2(math.e) * head_dim**-0.5, H=heads, D=head_dim, GROUPS=way.groups,
        KEYS=way.keys, STAGES=way.stages, AHEAD=way.ahead, TURNS=way.turns, RARE=way.rare, LATE=way.late,
        REGISTERS=way.registers, num_warps=4)
    if parts > 1:
        waves.add_up(some, sums, out[:, first:], base=2)
    return out


def _tiles(x: Tensor, keys: int) -> TensorDescriptor:
    """[1, S, H, D] in tiles of as many keys of one head."""
    _, count, heads, head_dim = x.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    block = [keys, 1, head_dim]
    return TensorDescriptor(x, [count, heads, head_dim], [x.stride(1), x.stride(2), 1], block,
                            gl.NVMMASharedLayout.get_default_for(block, dtype))
