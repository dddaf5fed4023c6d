"""Attention on a GPU, and what of it is for Hopper alone; in 8 bits it is in tests/test_gpu_fp8.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from tests.test_gpu import TOLERANCE, draw, relative
from wan import fp8_decoder, waves
from wan.attention import BACKENDS, attention, chosen, fastest, one_head, pytorchs
from wan.kernels import fp8
from wan.kernels.hopper import is_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16], ids=str)
@pytest.mark.parametrize("parts,queries,heads,head_dim", [(2, 456, 12, 128), (5, 7, 3, 64), (3, 1, 1, 48)])
@pytest.mark.parametrize("base", [math.e, 2.0])
def test_parts_of_attention_are_added_up(dtype, parts, queries, heads, head_dim, base):
    """Laid out by queries and by heads, into some of the queries of a longer tensor."""
    sums = 5 * draw(parts, heads, queries, 1).transpose(1, 2)
    by_heads = draw(parts, heads, queries, head_dim, dtype=dtype).transpose(1, 2)
    for some in (by_heads, by_heads.contiguous()):
        whole = torch.full((1, queries + 9, heads, head_dim), 7.0, device="cuda", dtype=dtype)
        waves.add_up(some, sums, whole[:, 4:-5], base)
        expected = waves.add_up_plain(some.double(), sums.double(), base)
        assert relative(whole[:, 4:-5], expected) < TOLERANCE.get(dtype, 1e-3)
        assert (whole[:, :4] == 7).all() and (whole[:, -5:] == 7).all()


@pytest.mark.parametrize(("queries", "keys"), [(1000, 512), (4680, 4680), (1000, 18720), (4680, 18720)])
def test_attention(queries, keys):
    q, k, v = draw(1, queries, 12, 128), draw(1, keys, 12, 128), draw(1, keys, 12, 128)
    with fastest(q.device):
        got = attention(*(t.bfloat16() for t in (q, k, v)))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(128**0.5).softmax(-1)
    assert relative(got, torch.einsum("bhqk,bkhd->bqhd", weights, v)) < 1e-2


@pytest.fixture
def of_hopper():
    """Its own kernel of attention."""
    if not is_hopper(CUDA):
        pytest.skip("only Hopper has a kernel of its own")
    from wan.kernels import gluon_attention

    return gluon_attention.attention


def test_hopper_takes_its_own_kernels(of_hopper):
    """They are compared with their plain versions first; where that failed, others would do the same, and no test."""
    assert chosen(CUDA, torch.bfloat16, 128) == "gluon attention"
    assert fp8._has_gluon(CUDA) and fp8_decoder._is_able(CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "heads"), [
    (1, 1, 1), (193, 64, 3), (193, 777, 3), (4680, 64, 12), (1, 18720, 12), (4680, 4680, 3), (4680, 18720, 12),
])
@pytest.mark.parametrize("sharpness", [1, 4])
def test_attention_of_hopper(of_hopper, dtype, queries, keys, heads, sharpness):
    """Keys are of a longer cache, after which there are no numbers; values are some channels of a wider tensor."""
    q = sharpness * draw(1, queries, heads, 128, dtype=dtype)
    cache = draw(1, keys + 100, heads, 128, dtype=dtype)
    cache[:, keys:] = float("nan")
    k, v = cache[:, :keys], draw(1, keys, heads, 3 * 128, dtype=dtype)[..., 128:256]
    some = torch.arange(max(1, queries // 256 - 1), queries + 1, max(1, queries // 256), device="cuda") - 1
    weights = torch.einsum("bqhd,bkhd->bhqk", q[:, some].double(), k.double()).div(128**0.5).softmax(-1)
    exact = torch.einsum("bhqk,bkhd->bqhd", weights, v.double())
    got = of_hopper(q, k, v)
    assert got.isfinite().all()
    chance = (len(some) * heads) ** -0.5  # of an error that is taken over so few rows, each rounded as a whole
    with fastest(q.device):
        assert relative(got[:, some], exact) <= (1.1 + chance) * relative(pytorchs(q, k, v)[:, some], exact) + 1e-6


def test_attention_of_hopper_in_a_graph(of_hopper):
    q, k, v = (draw(1, count, 12, 128, dtype=torch.bfloat16) for count in (4680, 9360, 9360))
    expected = of_hopper(q, k, v).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = of_hopper(q, k, v)
    for _ in range(3):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples,queries,keys", [(3, 6240, 6240), (1, 6240, 6240), (2, 130, 100), (1, 1, 1)])
def test_attention_of_one_wide_head(dtype, samples, queries, keys):
    whole = draw(samples, max(queries, keys), 3 * 384, dtype=dtype)
    whole[..., 0] *= 9
    q, k, v = (x[:, :count] for x, count in zip(whole.chunk(3, -1), (queries, keys, keys), strict=True))
    weights = torch.einsum("nqc,nkc->nqk", q.double(), k.double()).div(384**0.5).softmax(-1)
    expected = torch.einsum("nqk,nkc->nqc", weights, v.double())
    assert relative(one_head(q, k, v), expected) < 2 * TOLERANCE[torch.bfloat16]
    plain = F.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)))[:, 0]
    assert relative(one_head(q, k, v), expected) <= 1.2 * relative(plain, expected)


def test_the_first_back_end_that_can_is_taken_and_told(monkeypatch):
    kind = (torch.device("cuda"), torch.bfloat16, 128)
    monkeypatch.setattr("wan.attention._can_be_ours", lambda *kind: False)
    names = {backend.name.lower().replace("_", " ") for backend in BACKENDS}
    assert chosen(*kind) in names
    monkeypatch.setattr("wan.attention.BACKENDS", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
    assert chosen(*kind) == "math"
    monkeypatch.setattr("wan.attention.BACKENDS", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    assert chosen(torch.device("cuda"), torch.float32, 128) == "math"  # which flash attention does not take
