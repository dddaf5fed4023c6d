"""`precision: fp8` on a GPU against its plain versions: `python -m pytest -m gpu tests/test_gpu_fp8.py`."""

import copy
import dataclasses
import sys

import pytest
import torch

from demo.random_weights import SIZES, randomise
from pipeline.engine import Engine
from pipeline.precision import check_precision
from scripts.benchmarking import gpu_use
from scripts.benchmarking.random_engine import random_engine
from scripts.fp8_quality import generator_errors, generator_in_8_bits
from tests.clips import encoded_clip
from tests.conftest import REPOSITORY
from tests.test_fp8 import as_float, exact_attention, relative, with_outliers
from tests.test_fp8_quality import assert_near_full_precision
from utils.checkpoint import fill
from utils.config import load_config
from wan import fp8_decoder
from wan.fp8_cache import QuantisedKVCache
from wan.kernels import fp8, fp8_conv, rms_rope_plain
from wan.kernels.fp8 import Held, Rows
from wan.kernels.hopper import is_hopper
from wan.rope import RotaryEmbedding
from wan.vae import WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder

CUDA = torch.device("cuda")
OLD = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(OLD, reason="no CUDA GPU of compute capability 8.9")]

ROUNDING = 4e-3  # of a result in bfloat16, and of values on the border between two that can be had
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return with_outliers(*shape).to(CUDA, dtype)


def assert_same_rows(got: Rows, expected: Rows) -> None:
    assert got.values.dtype == torch.int8 and got.values.shape == expected.values.shape
    assert relative(got.scale.flatten(), expected.scale.flatten()) < 1e-5
    assert relative(as_float(got), as_float(expected)) < ROUNDING


def test_this_gpu_is_taken():
    check_precision("fp8", CUDA)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4680, 1536), (1, 4680, 8960), (2, 7, 96), (3, 5, 33)])
def test_quantise_and_gelu(dtype, shape):
    x = draw(*shape, dtype=dtype)
    x[0, 0] = 0
    smooth = torch.rand(shape[-1], device=CUDA) + 0.1
    for some in (None, smooth):
        assert_same_rows(fp8.quantise(x, some), fp8.quantise_plain(x, some))
    assert_same_rows(fp8.gelu_quantise(x, smooth), fp8.gelu_quantise_plain(x, smooth))


def test_what_is_no_number_stays_none():
    x = torch.randn(1, 2, 33, device=CUDA)
    x[0, 1, 3] = torch.nan
    got = as_float(fp8.quantise(x))
    assert got[0, 1].isnan().all() and not got[0, 0].isnan().any()


@DTYPES
@pytest.mark.parametrize("batch,frames,tokens,dim", [(1, 3, 1560, 1536), (2, 3, 7, 96), (1, 12, 31, 128)])
def test_modulate(dtype, batch, frames, tokens, dim):
    x, e = draw(batch, frames, tokens, dim, dtype=dtype), torch.randn(batch, frames, 6, dim, device=CUDA).to(dtype)
    shift, scale, *_ = e.split(1, dim=2)
    given = (shift, scale, 1e-6, torch.rand(dim, device=CUDA) + 0.1)
    assert_same_rows(fp8.modulate_quantise(x, *given), fp8.modulate_quantise_plain(x, *given))
    y = draw(batch, frames, tokens, dim, dtype=dtype)
    total, rows = fp8.add_modulate_quantise(x, y, *given)
    assert relative(total, x + y) < ROUNDING
    assert_same_rows(rows, fp8.modulate_quantise_plain(total, *given))


@pytest.mark.parametrize("rows,inputs,outputs", [
    (4680, 1536, 4608), (4680, 1536, 8960), (4680, 8960, 1536), (1500, 256, 768), (14, 64, 96), (129, 48, 272),
    (1, 32, 32),
])
def test_linear(rows, inputs, outputs):
    x, weight = fp8.quantise(draw(1, rows, inputs)), fp8.quantise(draw(outputs + 16, inputs))
    for skip in (0, 16):  # the weights are then a slice
        some, bias = Rows(*(part[skip:] for part in weight)), torch.randn(outputs + 16 - skip, device=CUDA).bfloat16()
        got = fp8.linear(x, some, bias)
        assert got.dtype == torch.bfloat16 and got.shape == (1, rows, outputs + 16 - skip)
        assert relative(got, fp8.linear_plain(x, some, bias.float())) < ROUNDING


@DTYPES
@pytest.mark.parametrize("shares_scales", [False, True])
@pytest.mark.parametrize("batch,frames,rows,columns,heads,head_dim",
                         [(1, 3, 30, 52, 12, 128), (2, 3, 3, 5, 3, 64), (1, 1, 2, 2, 1, 128)])
def test_queries_keys_and_values(dtype, shares_scales, batch, frames, rows, columns, heads, head_dim):
    tokens, dim, run = frames * rows * columns, heads * head_dim, rows * columns if shares_scales else 1
    turns = RotaryEmbedding(head_dim, rows, columns, CUDA).turns(200_000, frames)
    x, weight = draw(batch, tokens, 3 * dim, dtype=dtype), torch.randn(dim, device=CUDA).to(dtype)
    q, k, v = x.chunk(3, -1)  # rows of x, not in one piece
    v = v.unflatten(-1, (heads, head_dim))
    rope = lambda y: rms_rope_plain(y.float(), weight.float(), 1e-6, turns)
    assert_same_rows(fp8.rms_rope_quantise(q, weight, 1e-6, turns), fp8.quantise_plain(rope(q)))
    mean, scale = torch.randn(batch, heads, head_dim, device=CUDA), torch.rand(batch, heads, device=CUDA) / 50 + 0.01
    keys = torch.zeros(batch, 2 * tokens + 5, heads, head_dim, device=CUDA, dtype=torch.int8)
    key_scales = torch.zeros(batch, heads, 2 * tokens + 5, device=CUDA)
    written = keys[:, 5 : 5 + tokens], key_scales[..., 5 : 5 + tokens]
    fp8.write_keys(k, weight, 1e-6, turns, mean, *written, run)
    expected = tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in written)
    fp8.write_less_mean(rope(k), mean, *expected, run)
    assert_same_rows(*(Rows(part, scales.transpose(1, 2)[..., None]) for part, scales in (written, expected)))
    values = torch.zeros(batch, heads, head_dim, 2 * tokens + 5, device=CUDA).to(fp8.E4M3)
    fp8.write_values(v, scale, values[..., 3 : 3 + tokens])
    expected = fp8.to_e4m3(v.float() / scale[:, None, :, None]).permute(0, 2, 3, 1)
    assert relative(values[..., 3 : 3 + tokens].float(), expected.float()) < ROUNDING
    for store, axis, start in ((keys, 1, 5), (key_scales, 2, 5), (values, 3, 3)):  # and nothing beside it
        rest = store.float().transpose(axis, 0)
        assert not rest[:start].any() and not rest[start + tokens :].any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("batch,queries,keys,heads,run", [
    (1, 4680, 4680, 12, 1560), (1, 4680, 18720, 12, 1560), (1, 1000, 18720, 12, 4680), (1, 1000, 18720, 12, 1),
    (2, 33, 70, 3, 1), (2, 33, 70, 3, 7), (1, 1, 1, 1, 1), (1, 128, 128, 2, 128), (2, 129, 257, 2, 257),
    (1, 64, 1024, 2, 512), (2, 50, 1800, 2, 200), (1, 193, 1664, 3, 208), (1, 300, 777, 2, 259),
    (1, 4680, 9360, 12, 1560),
])
def test_attention(head_dim, batch, queries, keys, heads, run):
    q, k, v = (torch.randn(batch, n, heads, head_dim, device=CUDA) for n in (queries, keys, keys))
    k[..., 0] += 3
    k *= 1 - (torch.arange(keys, device=CUDA) // run % 3)[:, None, None] / 3  # so that scales change
    capacity = -(-keys // 16) * 16 + 16
    value_scale = torch.rand(batch, heads, device=CUDA) / 50 + 0.01
    # What lies beyond the keys is no number.
    all_keys = torch.full((batch, capacity, heads, head_dim), 127, dtype=torch.int8, device=CUDA)[:, :keys]
    key_scale = torch.full((batch, heads, capacity), torch.nan, device=CUDA)[..., :keys]
    store = torch.full((batch, heads, head_dim, capacity), 0x7F, dtype=torch.uint8, device=CUDA)
    all_values = store.view(fp8.E4M3)[..., :keys]
    fp8.write_less_mean(k, torch.zeros(batch, heads, head_dim, device=CUDA), all_keys, key_scale, run)
    fp8.write_values(v, value_scale, all_values)
    held, rows = Held(all_keys, all_values, key_scale, value_scale, run), fp8.quantise_plain(q)
    got = fp8.attention(rows, held, torch.float32)
    given = (as_float(rows), all_keys.float() * key_scale.transpose(1, 2)[..., None],
             (all_values.float() * value_scale[:, :, None, None]).permute(0, 3, 1, 2))
    error = relative(got, exact_attention(*given))  # only the weights are rounded between the two
    assert error < 0.03, error
    assert error < 1.2 * relative(fp8.attention_plain(rows, held, torch.float32), exact_attention(*given)) + 1e-3


@pytest.mark.parametrize("run", [1, 18720])
def test_sums_over_many_keys_are_not_cut_short(run):
    """Values that are all alike: Hopper's own sums of e4m3 products lose small terms, and all of them one way."""
    q, keys = torch.zeros(1, 128, 1, 128, device=CUDA), torch.zeros(1, 18720, 1, 128, device=CUDA, dtype=torch.int8)
    values, one = torch.ones(1, 1, 128, 18720, device=CUDA).to(fp8.E4M3), torch.ones(1, 1, device=CUDA)
    held = Held(keys, values, torch.ones(1, 1, 18720, device=CUDA), one, run)
    got = fp8.attention(fp8.quantise_plain(q), held, torch.float32)
    assert (got - 1).abs().max() < 1e-3


@pytest.mark.parametrize("head_dim,run", [(64, 1), (128, 20_000)])
def test_lengths_that_change_compile_nothing(head_dim, run):
    q = torch.randn(1, 4681, 2, head_dim, device=CUDA)
    kernel = sys.modules[fp8._attention_kernel(q, run).__module__]._attention

    def call(queries: int, keys: int) -> int:
        """How many kernels there are after attention of these lengths."""
        rows, one = fp8.quantise_plain(q[:, :queries]), torch.ones(1, 2, device=CUDA)
        k, capacity = torch.zeros(1, keys, 2, head_dim, device=CUDA, dtype=torch.int8), -(-keys // 16) * 16
        v, scales = torch.zeros(1, 2, head_dim, capacity, device=CUDA), torch.ones(1, 2, capacity, device=CUDA)
        held = Held(k, v.to(fp8.E4M3)[..., :keys], scales[..., :keys], one, run)
        fp8.attention(rows, held, torch.float32)
        return sum(len(kernels) for kernels, *_ in kernel.device_caches.values())

    first = call(100, 100)
    assert [call(*sizes) for sizes in ((1, 1), (16, 16), (4680, 18720), (4681, 1), (1, 4681))] == [first] * 5


@pytest.fixture(scope="module")
def engine():
    """Random weights of the small model's shapes, in bfloat16."""
    return random_engine(load_config(None, ["height=112", "width=192", "device=cuda"]), "toy")


def test_model_is_as_near_to_full_precision_as_the_plain_one(engine):
    fast = generator_errors(engine, generator_in_8_bits(engine), 5, "a")
    assert max(fast.flows()) < 0.05, fast
    slow_engine = copy.copy(engine)
    slow_engine.generator, slow_engine.device = copy.deepcopy(engine.generator).cpu(), torch.device("cpu")
    slow_engine.decoder = copy.deepcopy(engine.decoder).to(torch.device("cpu"))
    slow = generator_errors(slow_engine, generator_in_8_bits(slow_engine), 2, "a")
    for t, errors in slow.flow.items():
        assert fast.flow[t][0] == pytest.approx(errors[0], rel=0.25)


@pytest.mark.parametrize("changes", [{}, {"use_infinite_attention": True}, {"local_attn_size": -1}])
def test_small_model_is_near_full_precision(changes):
    """As with the plain versions; in bfloat16."""
    overrides = [f"model_kwargs.{key}={value}" for key, value in changes.items()]
    engine = Engine.from_config(load_config(REPOSITORY / "configs/demo.yaml", ["device=cuda", *overrides]))
    caption, latents = encoded_clip(15, seed=0)
    assert_near_full_precision(generator_errors(engine, generator_in_8_bits(engine), 5, caption, latents.to(CUDA)))


@pytest.mark.parametrize("overrides", [[], ["model_kwargs.use_infinite_attention=true"],
                                       ["model_kwargs.local_attn_size=-1"]])
def test_session_in_fp8(overrides):
    """Through evictions and a re-cache, without a call that waits for the GPU."""
    config = load_config(None, ["height=112", "width=192", "device=cuda", "precision=fp8", *overrides])
    engine = random_engine(config, "toy")
    assert engine.generator.cache_type is QuantisedKVCache
    videos = []
    for _ in range(2):
        session = engine.session(seed=1)
        for block in range(8):
            session.set_prompt("a" if block < 6 else "bb")
            frames = session.step()
        videos.append(frames)
    assert torch.equal(*videos) and videos[0].float().std() > 1
    if "use_infinite_attention" not in "".join(overrides):
        assert "no synchronising call" in gpu_use.check_no_waiting(engine)


def test_full_size_block():
    """The shapes that matter: one block of the published model's sizes, of two layers."""
    sizes = dataclasses.replace(SIZES["full"], generator=dataclasses.replace(SIZES["full"].generator, num_layers=2))
    engine = random_engine(load_config(None, ["device=cuda"]), sizes)
    errors = generator_errors(engine, generator_in_8_bits(engine), 1, "a")
    assert max(errors.flows()) < 0.08, errors


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 60, 104, 384), (2, 3, 5, 7, 96), (1, 4, 33, 17, 192), (1, 1, 9, 40, 16)])
def test_frames_for_convolutions(shape, has_bias):
    """Also that the zeros around them are written, and nothing beside them."""
    x, gamma, bias = draw(*shape, dtype=torch.bfloat16), draw(shape[-1]).bfloat16(), draw(shape[-1]).bfloat16()
    bias, steps = bias if has_bias else None, fp8_conv.steps_for(gamma)
    whole = fp8_conv.room(x, shape[1] + 2)
    whole.view(torch.uint8).fill_(7)
    fp8_conv.norm_silu_e4m3(x, gamma, bias, steps, whole[:, 2:])
    expected = fp8_conv.room(x, shape[1])
    fp8_conv.norm_silu_e4m3_plain(x, gamma, bias, steps, expected)
    got = whole[:, 2:].float()
    assert (whole[:, :2].view(torch.uint8) == 7).all()
    assert relative(got, expected.float()) < 5e-3  # those on a border between two numbers that can be had
    fp8_conv.inner(got)[:] = 0
    assert (got == 0).all()


def test_frames_for_convolutions_of_what_is_no_number():
    x = torch.randn(1, 1, 2, 3, 32, device=CUDA).bfloat16()
    x[0, 0, 1, 1, 5] = torch.nan
    frames = fp8_conv.room(x, 1)
    fp8_conv.norm_silu_e4m3(x, torch.ones(32, device=CUDA).bfloat16(), None, 10.0, frames)
    numbers = fp8_conv.inner(frames).float()[0, 0]
    assert numbers[1, 1].isnan().all() and numbers.isnan().sum() == 32


on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(CUDA), reason="no Hopper")


def frames_and_filters(batch: int, frames: int, height: int, width: int, channels: int, results: int):
    frames = fp8_conv.room(torch.empty(batch, 1, height, width, channels, device=CUDA), frames)
    frames[:] = 0
    values = 30 * draw(*fp8_conv.inner(frames).shape).tanh()
    values[..., :3] += 9  # a border that is not zero would show
    fp8_conv.inner(frames).copy_(fp8.to_e4m3(values))
    return frames, fp8_conv.filters_of(draw(results, channels, 3, 3, 3), 30.0)


@on_hopper
@pytest.mark.parametrize("sizes", [
    (1, 6, 60, 832, 96, 96), (1, 3, 9, 70, 96, 96), (2, 5, 7, 33, 96, 80), (1, 6, 30, 416, 192, 192),
    (2, 4, 9, 104, 192, 384), (1, 5, 60, 104, 384, 384), (1, 4, 120, 208, 384, 384), (1, 3, 2, 3, 16, 16),
    (2, 4, 20, 30, 48, 208),
], ids=str)
def test_convolution(sizes):
    ring, filters = frames_and_filters(*sizes)
    frames, results = sizes[1], sizes[-1]
    bias = torch.randn(results, device=CUDA).bfloat16()
    skip = torch.randn(sizes[0], frames - 2, *sizes[2:4], results, device=CUDA).bfloat16()
    exact = fp8_conv.conv3d_e4m3_plain(ring, 0, frames, filters, None, None, torch.float32)
    for own, other in ((None, None), (bias, None), (bias, skip)):
        expected = exact + (0 if own is None else own) + (0 if other is None else other)
        got = fp8_conv.conv3d_e4m3(ring, 0, frames, filters, own, other, torch.bfloat16)
        # Hopper's sums of such products are coarser than float32, if far less so than the products' own rounding.
        assert got.dtype == torch.bfloat16 and relative(got, expected) < 1e-2
        turned = ring.view(torch.uint8).roll(2, 1).view(ring.dtype)
        assert torch.equal(fp8_conv.conv3d_e4m3(turned, 2 % frames, frames, filters, own, other, torch.bfloat16), got)
    if frames > 3:
        fewer = fp8_conv.conv3d_e4m3(ring, 1, frames - 1, filters, None, None, torch.bfloat16)
        assert relative(fewer, exact[:, 1:]) < 1e-2


def decode(vae: WanVAE, latents: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    stream = vae.stream()
    return torch.cat([stream(block) for block in latents.split(sizes, dim=1)], 1)


@on_hopper
@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_is_as_near_to_float32_as_the_plain_one(batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device("meta"):
        model = VAEDecoder(VAEConfig())
    weights = randomise(model, "cuda", torch.Generator("cuda").manual_seed(0))
    new = lambda dtype: WanVAE(fill(copy.deepcopy(model), weights, "random", dtype)).to(CUDA)
    latents = torch.randn(batch, 7, 16, 10, 14, device=CUDA)
    exact = decode(new(torch.float32), latents, [3, 4])
    fast = fp8_decoder.to_fp8(new(torch.bfloat16), CUDA)
    assert sum(isinstance(module, fp8_decoder.Fp8CausalConv3d) for module in fast.model.modules()) == 28
    got = decode(fast, latents, [3, 3, 1])
    assert torch.equal(got, decode(fast, latents, [3, 3, 1]))
    for name in ("norm_silu_e4m3", "conv3d_e4m3"):
        monkeypatch.setattr(fp8_decoder, name, getattr(fp8_conv, name + "_plain"))
    plain = decode(fast, latents, [3, 4])
    assert relative(got, exact) < 1.1 * relative(plain, exact) < 0.2
