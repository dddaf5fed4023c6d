"""What both attention kernels for Hopper are made of, in Gluon: how the work is shared out, and sums of rows that stay
where they are."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

LOAD = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as later and earlier Tritons call it
ROWS, WARP_GROUPS = gl.constexpr(64), gl.constexpr(3)  # queries of a group of warps, and such groups
TILE = gl.constexpr(ROWS.value * WARP_GROUPS.value)  # queries of a tile
KEYS = gl.constexpr(128)  # of a tile
REGISTERS, OF_LOADER = gl.constexpr(160), gl.constexpr(24)  # of a thread


@gluon.jit
def piece_of(index, tiles, whole, parts, key_tiles, H: gl.constexpr):
    """The head, the tile of queries, the part of the keys, and its tiles, from one to before another, of a piece of
    work. The first `whole` tiles of queries attend to all keys, the others to `parts` of them."""
    part, count = index * 0, index * 0 + 1  # of the type of what they become in the other branch
    if index < whole * H:
        head, tile = index // whole, index % whole
    else:
        rest = index - whole * H
        part, count = rest % parts, parts
        head, tile = rest // parts // (tiles - whole), whole + rest // parts % (tiles - whole)
    return head, tile, part, part * key_tiles // count, (part + 1) * key_tiles // count


@gluon.jit
def sum_by_threads(weights):
    """[ROWS, KEYS] → [ROWS, 4]: what the four threads that share a row have of it. They need not meet in each tile."""
    return gl.sum(gl.sum(weights.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def times(x, by_row):
    """x [ROWS, n] · by_row [ROWS], which any thread has for the rows that it has of x."""
    return x * gl.convert_layout(by_row, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]
