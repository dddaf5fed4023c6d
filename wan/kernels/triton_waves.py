"""Adds up attention to parts of the keys; the plain version is in `wan.waves`."""

import math

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a program


@triton.jit(do_not_specialize=["rows"])
def _add_up(parts, log_sums, out, rows, part_stride, query_stride, head_stride, sum_part_stride, sum_query_stride,
            sum_head_stride, out_query_stride, out_head_stride, factor, PARTS: tl.constexpr, H: tl.constexpr,
            D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A row is a head of a query."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head, channel = row // H, row % H, tl.arange(0, BLOCK)
    inside = row < rows
    sums = log_sums + query * sum_query_stride + head * sum_head_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(sums + part * sum_part_stride, inside, other=0.0) * factor)
    mask = inside[:, None] & (channel < D)[None, :]
    places = parts + (query * query_stride + head * head_stride)[:, None] + channel[None, :]
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp2(tl.load(sums + part * sum_part_stride, inside, other=0.0) * factor - top)
        total += weight
        acc += weight[:, None] * tl.load(places + part * part_stride, mask, other=0.0).to(tl.float32)
    places = out + (query * out_query_stride + head * out_head_stride)[:, None] + channel[None, :]
    tl.store(places, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask)


def add_up(parts: Tensor, log_sums: Tensor, out: Tensor, base: float) -> None:
    count, queries, heads, dim = parts.shape
    if parts.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError(f"channels of strides {parts.stride()} and {out.stride()} do not follow each other")
    block = triton.next_power_of_2(dim)
    rows = max(1, ELEMENTS // block)
    _add_up[(triton.cdiv(queries * heads, rows),)](
        parts, log_sums, out, queries * heads, *parts.stride()[:3], *log_sums.stride()[:3], *out.stride()[1:3],
        math.log2(base), PARTS=count, H=heads, D=dim, BLOCK=block, ROWS=rows, num_warps=4,
    )
