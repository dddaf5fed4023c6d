"""Attention in whole waves: which queries are shared out, and that nothing is lost by it."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_fp8 import exact_attention, relative
from wan import waves


def test_a_block_on_a_gpu_with_132_processors():
    assert waves.shares(4680, 18720, 12, tile=128, at_once=132) == (4224, 2)  # 33 tiles of 12 heads are three waves
    assert waves.shares(4680, 18720, 12, tile=64, at_once=264) == (4224, 2)
    assert waves.shares(4680, 18720, 12, tile=64, at_once=396) == (4224, 3)  # a quarter of the keys is no whole groups
    assert waves.shares(4680, 18720, 12, tile=192, at_once=132) == (4224, 3)
    assert waves.shares(4680, 14040, 12, tile=192, at_once=132) == (4680, 1)  # by 2 or 3: no whole groups
    assert waves.shares(4680, 14040, 12, tile=192, at_once=132, even=False) == (4224, 3)
    assert waves.shares(4680, 512, 12, tile=128, at_once=132) == (4680, 1)  # a prompt's keys are too few
    assert waves.shares(4224, 18720, 12, tile=128, at_once=132) == (4224, 1)  # whole waves as they are
    assert waves.shares(1000, 18720, 12, tile=128, at_once=132) == (1000, 1)  # less than one


@given(st.integers(1, 20_000), st.integers(1, 2000), st.integers(1, 40), st.sampled_from([64, 128, 192]),
       st.integers(1, 400), st.booleans())
def test_what_is_shared_out_fits_into_one_wave(queries, keys, heads, tile, at_once, even):
    keys *= 16
    whole, parts = waves.shares(queries, keys, heads, tile, at_once, even)
    assert 0 < whole <= queries
    if parts == 1:
        assert whole == queries
        return
    assert not even or keys % (16 * parts) == 0
    full = -(-whole * heads // tile // at_once)  # waves of the whole tiles
    assert whole % tile == 0 and (whole // tile) * heads <= full * at_once
    assert -(-(queries - whole) // tile) * heads * parts <= at_once


@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.1, 30))
def test_parts_add_up_to_attention_to_all_keys(seed, parts, sharpness):
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 2, 8, generator=random, dtype=torch.float64) for n in (5, 12 * parts, 12 * parts))
    q = q * sharpness
    pieces = [x.chunk(parts, 1) for x in (k, v)]
    some = torch.cat([exact_attention(q, *piece) for piece in zip(*pieces, strict=True)])
    scores = torch.cat([torch.einsum("bqhd,bkhd->bqhk", q, piece) / 8**0.5 for piece in pieces[0]])
    sums, out = scores.logsumexp(-1, keepdim=True), q.new_full((1, 9, 2, 8), 7.0)
    for scaled, base in ((sums, math.e), (sums / math.log(2), 2.0)):
        waves.add_up(some, scaled, out[:, 4:], base)
        assert relative(out[:, 4:], exact_attention(q, k, v)) < 1e-12 and (out[:, :4] == 7).all()
