"""Attention in whole waves. A GPU computes as many tiles of queries at a time as fit its processors; where the tiles
are not a multiple of that, the last few take as long as all the others of a wave. They are shared out instead: each to
several parts of the keys, which are added up by their weights. That is the same attention, exactly (Dao et al. 2023,
Flash-Decoding).
"""

import math

import torch
from torch import Tensor

from wan.kernels import fused

MOST_WAVES = 8  # beyond, the last one matters little
FEWEST_KEYS = 4096  # below, adding up takes longer than it saves


def shares(queries: int, keys: int, heads: int, tile: int, at_once: int, even: bool = True) -> tuple[int, int]:
    """How many queries fill whole waves, and to how many parts of the keys the others attend: all and 1 where that
    would not help. tile: queries of a tile; at_once: tiles that a GPU computes at a time; even: parts are of as many
    keys, and of whole groups of 16."""
    tiles = -(-queries // tile)
    waves = tiles * heads // at_once
    whole = waves * at_once // heads
    rest = tiles - whole
    most = at_once // (heads * rest) if rest else 1
    parts = next((parts for parts in range(most, 1, -1) if not even or keys % (16 * parts) == 0), 1)
    if not 1 <= waves <= MOST_WAVES or parts == 1 or keys < FEWEST_KEYS:
        return queries, 1
    return tile * whole, parts


def add_up(parts: Tensor, log_sums: Tensor, out: Tensor, base: float = math.e) -> None:
    """out ← attention to all keys, [1, S, H, D], of that to each part of them, [parts, S, H, D], and the logarithms to
    this base of the sums of the exponentials there, [parts, S, H, 1]. out may be some queries of a longer tensor."""
    if fused(parts, log_sums):
        from wan.kernels import triton_waves  # not before: Triton needs a GPU driver

        triton_waves.add_up(parts, log_sums, out, base)
    else:
        out.copy_(add_up_plain(parts, log_sums, base))


def add_up_plain(parts: Tensor, log_sums: Tensor, base: float = math.e) -> Tensor:
    weights = (log_sums * math.log(base)).softmax(0)
    return (parts.to(weights.dtype) * weights).sum(0, keepdim=True)


def at_once(device: torch.device, of_a_processor: int) -> int:
    """Tiles that a GPU computes at a time."""
    return of_a_processor * torch.cuda.get_device_properties(device).multi_processor_count
