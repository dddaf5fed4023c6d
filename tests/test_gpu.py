"""What only a GPU can show. All of them: `python -m pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F

from demo.random_weights import SIZES, randomise
from scripts.benchmark import RESOLUTIONS
from scripts.benchmarking.random_engine import random_engine
from tests.conftest import GOLDEN
from tests.diffusers_vae import DiffusersVAE, empty
from tests.parity import run
from utils.checkpoint import fill
from utils.config import load_config
from wan import kernels
from wan.kernels.conv import (
    conv3d,
    conv3d_of_pairs,
    conv3d_of_ring,
    conv3d_plain,
    conv3d_to_few,
    conv3d_triton,
    reads_rings,
)
from wan.kv_cache import KVCache
from wan.model import Block, CausalWan
from wan.rope import RotaryEmbedding
from wan.vae import WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖; NaN where a value is not a number."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


# A float32 result of the same formula; a bfloat16 result rounds once, at 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@DTYPES
@pytest.mark.parametrize("batch,frames,tokens,dim", [(1, 3, 1560, 1536), (2, 3, 7, 96), (1, 12, 31, 128)])
def test_modulate_and_gate(dtype, batch, frames, tokens, dim):
    x, y = draw(batch, frames, tokens, dim, dtype=dtype) + 3, draw(batch, frames, tokens, dim, dtype=dtype)
    shift, scale, gate, *_ = draw(batch, frames, 6, dim, dtype=dtype).split(1, dim=2)
    as_double = [t.double() for t in (x, shift, scale, gate, y)]
    got = kernels.modulate(x, shift, scale, 1e-6)
    assert relative(got, kernels.modulate_plain(*as_double[:3], 1e-6)) < TOLERANCE[dtype]
    got = kernels.gated(x, gate, y)
    total = kernels.gated_plain(as_double[0], as_double[3], as_double[4])
    assert relative(got, total) < TOLERANCE[dtype]
    weight, bias = draw(dim, dtype=dtype), draw(dim, dtype=dtype)
    got, normed = kernels.gated_norm(x, gate, y, weight, bias, 1e-6)
    assert relative(got, total) < TOLERANCE[dtype]
    assert relative(normed, F.layer_norm(got.double(), (dim,), weight.double(), bias.double(), 1e-6)) < TOLERANCE[dtype]
    got, normed = kernels.add_modulate(x, y, shift, scale, 1e-6)
    assert relative(got, as_double[0] + as_double[4]) < TOLERANCE[dtype]
    assert relative(normed, kernels.modulate_plain(got.double(), *as_double[1:3], 1e-6)) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("batch,frames,rows,columns,dim,head_dim",
                         [(1, 3, 30, 52, 1536, 128), (2, 3, 3, 5, 96, 48), (1, 1, 2, 2, 128, 64)])
def test_norm_and_rope(dtype, batch, frames, rows, columns, dim, head_dim):
    turns = RotaryEmbedding(head_dim, rows, columns, "cuda").turns(200_000, frames)
    x, weight = draw(batch, frames * rows * columns, dim, dtype=dtype), draw(dim, dtype=dtype)
    got = kernels.rms_rope(x, weight, 1e-6, turns)
    assert relative(got, kernels.rms_rope_plain(x.float(), weight.float(), 1e-6, turns)) < TOLERANCE[dtype]
    whole = torch.full((batch, 3 * x.shape[1], *got.shape[2:]), 7.0, device="cuda", dtype=dtype)
    place = whole[:, x.shape[1] : 2 * x.shape[1]]
    other = kernels.rms_rope_both(x.flip(1), x, weight.flip(0), weight, 1e-6, turns, out=place)
    assert torch.equal(other[0], kernels.rms_rope(x.flip(1), weight.flip(0), 1e-6, turns))
    assert other[1] is place and torch.equal(place, got)
    assert kernels.rms_rope(x, weight, 1e-6, turns, out=place) is place and torch.equal(place, got)
    assert (whole[:, : x.shape[1]] == 7).all() and (whole[:, 2 * x.shape[1] :] == 7).all()
    with pytest.raises(ValueError, match="can't take"):
        kernels.rms_rope(x, weight, 1e-6, turns, out=whole)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2, 60, 104, 384), (2, 3, 5, 7, 96), (1, 4, 33, 17, 8)])
def test_norm_silu_and_bias(dtype, shape):
    x, skip = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    gamma, bias = draw(shape[-1], dtype=dtype), draw(shape[-1], dtype=dtype)
    for some_bias in (None, bias):
        whole = torch.full((shape[0], shape[1] + 2, *shape[2:]), 7.0, device="cuda", dtype=dtype)
        kernels.norm_silu(x, gamma, some_bias, whole[:, 2:])
        expected = kernels.norm_silu_plain(x, gamma, some_bias)
        assert relative(whole[:, 2:], expected) < TOLERANCE[dtype]
        assert (whole[:, :2] == 7).all()
    expected = kernels.add_bias_plain(x.float(), bias.float(), skip.float())
    assert relative(kernels.add_bias(x.clone(), bias, skip), expected) < TOLERANCE[dtype]


@DTYPES
def test_linear_and_gelu(dtype):
    x, weight, bias = draw(2, 3, 50, 96, dtype=dtype), draw(200, 96, dtype=dtype), draw(200, dtype=dtype)
    got = kernels.linear_gelu(x, weight, bias)
    assert relative(got, kernels.linear_gelu_plain(x.double(), weight.double(), bias.double())) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("batch,tokens,dim", [(1, 4680, 1536), (2, 50, 96)])
def test_linear_writes_where_it_is_told_to(dtype, batch, tokens, dim):
    """The same numbers, and for one video by the same kernels: none for the bias, none that copies."""
    x, weight, bias = draw(batch, tokens, dim, dtype=dtype), draw(dim, dim, dtype=dtype), draw(dim, dtype=dtype)
    whole = torch.full((batch, 3 * tokens, dim), 7.0, device="cuda", dtype=dtype)
    place = whole[:, tokens : 2 * tokens]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        got = kernels.linear(x, weight, bias, place)
        torch.cuda.synchronize()
    assert relative(got, F.linear(x, weight, bias)) < TOLERANCE[dtype]
    assert (whole[:, :tokens] == 7).all() and (whole[:, 2 * tokens :] == 7).all()
    assert got.is_set_to(place) == (batch == 1)
    if batch == 1 and dtype == torch.bfloat16:
        assert sum(event.count for event in profiler.key_averages()
                   if "memcpy" in event.key.lower() or "elementwise" in event.key) == 0


def test_a_pass_copies_no_keys_and_no_values():
    sizes = SIZES["toy"].generator
    cache = KVCache(layers=1, batch=1, tokens=84, heads=sizes.num_heads, head_dim=sizes.head_dim, window=6, sink=0,
                    dtype=torch.bfloat16, device="cuda")
    block = Block(sizes).to("cuda", torch.bfloat16).self_attn
    x, turns = draw(1, 252, sizes.dim, dtype=torch.bfloat16), RotaryEmbedding(sizes.head_dim, 7, 12, "cuda").turns(3, 3)
    cache.begin(0, 3)
    cache.begin(3, 3)
    keys, values = cache.room(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        block.remember(x, turns, cache, 0)
        torch.cuda.synchronize()
    assert not [event.key for event in profiler.key_averages() if "memcpy" in event.key.lower()]
    assert relative(values.flatten(2), block.v(x)) < TOLERANCE[torch.bfloat16]
    expected = kernels.rms_rope_plain(block.k(x).float(), block.norm_k.weight.float(), 1e-6, turns)
    assert relative(keys, expected) < TOLERANCE[torch.bfloat16]


@DTYPES
@pytest.mark.parametrize("shape", [(4, 60, 104, 384), (2, 5, 7, 24), (1, 3, 1500, 4)])
def test_twice(dtype, shape):
    x = draw(*shape, dtype=dtype)
    assert torch.equal(kernels.twice(x), kernels.twice_plain(x))


@DTYPES
@pytest.mark.parametrize("shape,out", [((4, 60, 104, 384), 192), ((2, 5, 7, 24), 6), ((1, 3, 1500, 4), 4)])
def test_convolution_of_twice(dtype, shape, out, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, weight, bias = draw(*shape, dtype=dtype), draw(out, shape[-1], 3, 3, dtype=dtype), draw(out, dtype=dtype)
    got = kernels.conv2d_of_twice(x, weight, bias)
    expected = kernels.conv2d_of_twice_plain(x.double(), weight.double(), bias.double())
    assert relative(got, expected) < TOLERANCE[dtype]


NEW = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.parametrize("way", [conv3d, conv3d_of_pairs,
                                 pytest.param(conv3d_triton, marks=pytest.mark.skipif(not NEW, reason="no Hopper"))])
@pytest.mark.parametrize("shape,out", [((1, 6, 60, 832, 96), 96), ((2, 3, 7, 70, 32), 40), ((1, 4, 9, 130, 64), 3)])
def test_every_way_of_a_convolution(way, shape, out):
    x, weight, bias = (draw(*size, dtype=torch.bfloat16) for size in (shape, (out, shape[-1], 3, 3, 3), (out,)))
    skip = draw(shape[0], shape[1] - 2, *shape[2:4], out, dtype=torch.bfloat16)
    x[..., :3] += 2  # a border that is not zero would show
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    expected = conv3d_plain(x.double(), weight.double(), bias.double())
    assert relative(way(x, weight, None), expected - bias) < TOLERANCE[torch.bfloat16]
    assert relative(way(x, weight, bias), expected) < 2 * TOLERANCE[torch.bfloat16]  # cuDNN's sum is rounded before
    if out % 8 == 0:
        assert relative(way(x, weight, bias, skip), expected + skip) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not NEW, reason="no Hopper")
@pytest.mark.parametrize("tile", [(27, 64, 32, 4, 2), (27, 64, 128, 4, 3), (5, 128, 32, 8, 2)], ids=str)
@pytest.mark.parametrize("shape,out", [((1, 6, 60, 832, 96), 3), ((2, 4, 7, 70, 32), 4), ((1, 4, 28, 62, 64), 1)])
def test_convolution_to_few_channels(shape, out, tile, monkeypatch):
    from wan.kernels import triton_conv_to_few  # not before: Triton needs a GPU driver

    monkeypatch.setattr(triton_conv_to_few, "TILE", tile)
    x, weight, bias = (draw(*size, dtype=torch.bfloat16) for size in (shape, (out, shape[-1], 3, 3, 3), (out,)))
    skip = draw(shape[0], shape[1] - 2, *shape[2:4], out, dtype=torch.bfloat16)
    x[..., :3] += 2  # a border that is not zero would show
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    expected = conv3d_plain(x.double(), weight.double(), bias.double())
    assert relative(conv3d_to_few(x, weight, None), expected - bias) < TOLERANCE[torch.bfloat16]
    assert relative(conv3d_to_few(x, weight, bias), expected) < TOLERANCE[torch.bfloat16]
    assert relative(conv3d_to_few(x[:, 1:], weight, bias), expected[:, 1:]) < TOLERANCE[torch.bfloat16]
    assert relative(conv3d_to_few(x, weight, bias, skip), expected + skip) < 2 * TOLERANCE[torch.bfloat16]


def test_zeros_stay_zeros():
    x, gamma = torch.zeros(1, 2, 3, 3, 16, device="cuda"), draw(16)
    out = torch.full_like(x, 7)
    kernels.norm_silu(x, gamma, None, out)
    assert (out == 0).all()


@DTYPES
def test_decoder_streams_what_diffusers_decodes(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = empty({"base_dim": 32})
    weights = randomise(model, "cuda", torch.Generator("cuda").manual_seed(0))
    vae = DiffusersVAE(fill(model, weights, "random", torch.float32)).to(torch.device("cuda"))
    latents = draw(1, 7, 16, 12, 20)
    expected = vae.decode(latents)
    vae.model.to(dtype)
    stream = vae.stream()
    got = torch.cat([stream(block) for block in latents.split([3, 3, 1], dim=1)], 1)
    error = relative(got, expected)
    assert error < (1e-4 if dtype == torch.float32 else 0.03), error
    if dtype == torch.bfloat16:
        assert error <= 1.05 * relative(vae.decode(latents), expected)  # no further off than diffusers' own in bfloat16


@pytest.mark.skipif(not NEW, reason="no Hopper")
@pytest.mark.parametrize("batch,frames,start,count", [(1, 16, 0, 6), (1, 16, 13, 6), (2, 16, 11, 6), (2, 7, 5, 3)])
def test_convolution_of_a_ring(batch, frames, start, count):
    ring, weight, bias = (draw(*size, dtype=torch.bfloat16)
                          for size in ((batch, frames, 9, 130, 96), (96, 96, 3, 3, 3), (96,)))
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    skip = draw(batch, count - 2, 9, 130, 96, dtype=torch.bfloat16)
    x = ring.roll(-start, 1)[:, :count].contiguous()
    assert reads_rings(ring, weight) == (torch.cuda.get_device_capability()[0] == 9)
    for some in ((None, None), (bias, None), (bias, skip)):
        assert torch.equal(conv3d_of_ring(ring, start, count, weight, *some), conv3d(x, weight, *some))


@pytest.mark.skipif(not NEW, reason="no Hopper")
def test_frames_in_a_ring_are_decoded_as_those_that_are_copied(monkeypatch):
    with torch.device("meta"):
        model = VAEDecoder(VAEConfig())
    weights = randomise(model, "cuda", torch.Generator("cuda").manual_seed(0))
    vae = WanVAE(fill(model, weights, "random", torch.bfloat16)).to(torch.device("cuda"))
    latents = draw(1, 14, 16, 8, 18)

    def decode() -> torch.Tensor:
        stream = vae.stream()
        frames = torch.cat([stream(block) for block in latents.split([3, 3, 1, 4, 3], dim=1)], 1)
        assert bool(stream.rings) == rings
        return frames

    rings = torch.cuda.get_device_capability()[0] == 9
    in_ring = decode()
    monkeypatch.setattr("wan.causal_conv.reads_rings", lambda x, weight: False)
    rings = False
    assert torch.equal(in_ring, decode())


def test_fused_forward_is_no_further_from_float32_than_the_plain_one(monkeypatch):
    with torch.device("meta"):
        model = CausalWan(SIZES["toy"].generator)
    weights = randomise(model, "cuda", torch.Generator("cuda").manual_seed(0))
    latents, embeds = draw(1, 3, 16, 14, 24), draw(1, 20, SIZES["toy"].generator.text_dim)
    rope = RotaryEmbedding(SIZES["toy"].generator.head_dim, 7, 12, "cuda")

    def forward(dtype: torch.dtype) -> torch.Tensor:
        fill(model, weights, "random", dtype).to("cuda")
        cache = KVCache(layers=model.config.num_layers, batch=1, tokens=84, heads=model.config.num_heads,
                        head_dim=model.config.head_dim, window=3, sink=0, dtype=dtype, device="cuda")
        cache.begin(9, 3)
        return model(latents, 625.0, 9, rope, cache, model.encode_text(embeds))

    fused, exact = forward(torch.bfloat16), forward(torch.float32)
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    plain, plain_exact = forward(torch.bfloat16), forward(torch.float32)
    assert relative(exact, plain_exact) < 1e-4
    assert relative(fused, plain_exact) <= 1.1 * relative(plain, plain_exact)


def test_every_recorded_case_on_the_gpu():
    worst = dict(run(GOLDEN, torch.device("cuda")))
    assert len(worst) > 10 and max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize("overrides", [[], ["model_kwargs.use_infinite_attention=true"], ["global_sink=false"],
                                       ["precision=fp8"]], ids=str)
def test_captured_passes_give_the_same_video(overrides):
    """Bit for bit: blocks before the window is full, twice around the ring, a new prompt, and around it again."""
    def video(graphs: bool) -> torch.Tensor:
        settings = [*RESOLUTIONS["toy"], f"cuda_graphs={str(graphs).lower()}", *overrides]
        session = random_engine(load_config(None, settings), "toy").session(seed=0)
        session.set_prompt("a")
        made = [session.step_latents().clone() for _ in range(12)]
        session.set_prompt("b")
        made += [session.step_latents().clone() for _ in range(9)]
        assert (session._graphed is not None and len(session._graphed.graphs) >= 3) == graphs
        return torch.cat(made, 1)

    assert torch.equal(video(graphs=True), video(graphs=False))


def test_gradients_flow_where_they_are_wanted():
    """As in training a LoRA: only one of a fused operation's inputs may need a gradient."""
    with torch.inference_mode(False):
        x, y, gate = (torch.randn(1, 2, 3, 16, device="cuda") for _ in range(3))
        y.requires_grad_(True)
        kernels.gated(x, gate[:, :, :1], y).sum().backward()
        assert y.grad.any()
        weight = torch.randn(8, 16, device="cuda", requires_grad=True)
        kernels.linear_gelu(x, weight, torch.zeros(8, device="cuda")).sum().backward()
        assert weight.grad.any()
