"""The parts of `precision: fp8` by their plain versions, which round where the GPU's do; its cache is a KVCache.
tests/test_fp8_quality.py has the whole model; tests/test_precision.py where it is refused; tests/test_gpu_fp8.py holds
the GPU's versions against these."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_kv_cache import LAYERS, Setting, settings_of_a_video
from wan.fp8 import Int8Linear
from wan.fp8_cache import QuantisedKVCache
from wan.kernels import fp8, rms_rope
from wan.kernels.fp8 import Held, Rows
from wan.kv_cache import KVCache
from wan.rope import RotaryEmbedding, frame_pairs

HALF_STEP = 2**-4  # how far e4m3 rounds, relative to the value; below 2^-6 it rounds to multiples of 2^-9


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def with_outliers(*shape: int, seed: int = 0) -> Tensor:
    """As activations are: some channels fifty times as large as most, some rows ten times."""
    channels, rows = draw(shape[-1], seed=seed + 1).mul(1.3).exp(), draw(*shape[:-1], 1, seed=seed + 2).mul(0.7).exp()
    return draw(*shape, seed=seed) * channels * rows


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def as_float(x: Rows) -> Tensor:
    return x.values.float() * x.scale


def test_no_value_is_rounded_further_than_half_a_step():
    x = with_outliers(2, 50, 96)
    x[0, 0] = 0
    got = fp8.quantise(x)
    assert got.values.dtype == torch.int8 and got.scale.shape == (2, 50, 1)
    assert ((as_float(got) - x).abs() <= got.scale * 0.501).all()
    assert (as_float(got)[0, 0] == 0).all()


def test_too_large_a_value_is_the_largest_and_no_nan():
    assert fp8.to_e4m3(torch.tensor([1e9, -449.0, 448.0])).tolist() == [448, -448, 448]
    assert fp8.to_e4m3(torch.tensor(math.nan)).isnan()


def test_what_is_no_number_stays_none():
    for wrong in (math.nan, math.inf):
        x = draw(2, 32)
        x[1, 3] = wrong
        got = as_float(fp8.quantise(x))
        assert got[1].isnan().any() and not got[0].isnan().any()


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 768), (96, 32)])
def test_linear_layer(inputs, outputs):
    layer, x = nn.Linear(inputs, outputs), with_outliers(2, 40, inputs)
    layer.weight.data *= with_outliers(outputs, 1).abs()
    got = Int8Linear(layer)(x)
    assert got.dtype == torch.float32 and relative(got, layer(x)) < 0.03


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_linear_layer_whose_weights_make_up_for_outliers(power):
    """Channels that are large because their weights are small. e4m3 rows would be off by 3.7 %."""
    layer, x = nn.Linear(768, 256), with_outliers(2, 100, 768)
    layer.weight.data = draw(256, 768) * with_outliers(256, 1).abs() / x.abs().amax((0, 1)) ** power
    layer.weight.data[:, 5] = 0
    assert relative(Int8Linear(layer)(x), layer(x)) < 0.03


def test_layers_of_one_input_side_by_side():
    layers, x = [nn.Linear(32, 48) for _ in range(3)], draw(2, 5, 32)
    together = Int8Linear(*layers)
    assert relative(together(x), torch.cat([layer(x) for layer in layers], -1)) < 0.02
    assert torch.equal(together(x, skip=48), together(x)[..., 48:])


def test_bias_and_rows_are_in_the_dtype_of_the_layer():
    layer = nn.Linear(32, 32).bfloat16()
    assert Int8Linear(layer)(draw(1, 4, 32).bfloat16()).dtype == torch.bfloat16


def test_what_is_fused_with_quantising():
    x = with_outliers(2, 3, 5, 64)
    shift, scale, smooth = draw(2, 3, 1, 64), draw(2, 3, 1, 64), draw(64).abs() + 0.1
    normed = F.layer_norm(x, (64,), eps=1e-6)
    assert relative(as_float(fp8.modulate_quantise(x, shift, scale, 1e-6, smooth)),
                    (normed * (1 + scale) + shift).flatten(1, 2) * smooth) < 0.03
    assert relative(as_float(fp8.gelu_quantise(x, smooth)), F.gelu(x, approximate="tanh") * smooth) < 0.03
    y = draw(2, 3, 5, 64)
    total, rows = fp8.add_modulate_quantise(x, y, shift, scale, 1e-6, smooth)
    assert relative(total, x + y) < 1e-6
    assert relative(as_float(rows), as_float(fp8.modulate_quantise(x + y, shift, scale, 1e-6, smooth))) < 0.004


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, S, H, D], in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())


def new_cache(kind: type[KVCache] = QuantisedKVCache, **changes) -> KVCache:
    sizes = {"layers": 1, "batch": 1, "tokens": 20, "heads": 2, "head_dim": 64, "window": 12, "sink": 3,
             "dtype": torch.float32, "device": "cpu"}
    return kind(**sizes | changes)


@pytest.mark.parametrize("size", [1.0, 4.0])
def test_attention_to_a_cache_of_keys_with_outliers(size):
    """size: how sharp the attention is."""
    cache = new_cache(batch=2)
    blocks = [(with_outliers(2, 60, 2, 64, seed=i) / 8 + 2 * draw(2, 64), draw(2, 60, 2, 64, seed=7 + i))
              for i in range(4)]
    for i, (k, v) in enumerate(blocks):
        cache.begin(3 * i, 3)
        held = cache.update(0, k, v)
    q = draw(2, 60, 2, 64) * size / 2
    k, v = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    error = relative(fp8.attention(fp8.quantise(q), held, torch.float32), exact_attention(q, k, v))
    assert error < 0.06 * size, error


def test_what_all_keys_have_in_common_changes_nothing():
    """The vector that the cache takes from its keys, without any rounding."""
    q, k, v, common = draw(2, 7, 3, 16), draw(2, 30, 3, 16), draw(2, 30, 3, 16), 5 * draw(2, 3, 16)
    held = Held(k - common[:, None], v.permute(0, 2, 3, 1), torch.ones(2, 3, 30), torch.ones(2, 3))
    got = fp8.attention(Rows(q, torch.ones(1)), held, torch.float32)
    assert relative(got, fp8.attention(Rows(q, torch.ones(1)), held._replace(keys=k), torch.float32)) < 1e-5
    assert relative(got, exact_attention(q, k, v)) < 0.04  # weights are rounded


def test_keys_of_a_latent_share_a_scale():
    """As the attention of a GPU counts on; of other latents and heads they are their own."""
    cache = new_cache()
    cache.begin(0, 3)
    held = cache.update(0, with_outliers(1, 60, 2, 64), draw(1, 60, 2, 64))
    scales = held.key_scale.unflatten(-1, (3, 20))
    assert held.run == 20 and (scales == scales[..., :1]).all() and scales.unique().numel() == 6


@pytest.mark.parametrize("run", [1, 4, 20])
def test_no_key_is_rounded_further_than_half_a_step(run):
    k, mean = with_outliers(2, 20, 3, 16), draw(2, 3, 16)
    out, scale = torch.empty(2, 20, 3, 16, dtype=torch.int8), torch.empty(2, 3, 20)
    fp8.write_less_mean(k, mean, out, scale, run)
    step = scale.transpose(1, 2)[..., None]
    assert ((out * step + mean[:, None] - k).abs() <= 0.501 * step).all()
    assert out.abs().amax((1, 3)).eq(127).all()


def test_keys_less_their_mean_are_rounded_less():
    common = 30 * draw(2, 64)
    common[:, : 2 * frame_pairs(64)] = 0  # channels that turn with the frame keep their mean
    k, v, q = draw(1, 60, 2, 64) + common, draw(1, 60, 2, 64, seed=1), draw(1, 60, 2, 64, seed=2)
    cache = new_cache()
    cache.begin(0, 3)
    held = cache.update(0, k, v)
    rows = fp8.quantise(k)
    plain = held._replace(keys=rows.values, key_scale=rows.scale[..., 0].transpose(1, 2))
    errors = [relative(fp8.attention(fp8.quantise(q), one, torch.float32), exact_attention(q, k, v))
              for one in (held, plain)]
    assert errors[0] < 0.5 * errors[1], errors


def held_by(cache: QuantisedKVCache, layer: int, held: Held) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [B, S, H, D] as they are held, and how far each may be from what was written."""
    mean, _ = cache._fixed[layer]
    key_scale, value_scale = held.key_scale.transpose(1, 2)[..., None], held.value_scale[:, None, :, None]
    k, v = held.keys.float() * key_scale, held.values.float().permute(0, 3, 1, 2) * value_scale
    return k + mean[:, None], v, key_scale * 0.501, v.abs() * HALF_STEP * 1.15 + value_scale * 2**-9


class Pair:
    """A KVCache and a QuantisedKVCache that are told the same."""

    def __init__(self, setting: Setting, relative: bool):
        rope = RotaryEmbedding(setting.head_dim, setting.tokens, 1, "cpu") if relative else None
        sizes = {"layers": LAYERS, "batch": 1, "tokens": setting.tokens, "heads": setting.heads,
                 "head_dim": setting.head_dim, "window": setting.window, "sink": setting.sink, "device": "cpu"}
        self.setting = setting
        self.full = KVCache(dtype=torch.float32, rope=rope, **sizes)
        self.fp8 = QuantisedKVCache(dtype=torch.float32, rope=rope, **sizes)
        self.random = torch.Generator().manual_seed(setting.seed)

    def write(self, position: int, frames: int, passes: int) -> None:
        s = self.setting
        for cache in (self.full, self.fp8):
            cache.begin(position, frames)
        for _ in range(passes):
            for layer in range(LAYERS):
                # Of a size between 1 and 2, so that no block is far larger than the first.
                k, v = (1 + torch.rand(1, frames * s.tokens, s.heads, s.head_dim, generator=self.random)
                        for _ in range(2))
                keys, values = self.full.update(layer, k, v)
                held = self.fp8.update(layer, k, v)
                got_keys, got_values, keys_slack, values_slack = held_by(self.fp8, layer, held)
                assert got_keys.shape == keys.shape and ((got_keys - keys).abs() <= keys_slack).all()
                assert got_values.shape == values.shape and ((got_values - values).abs() <= values_slack).all()
        assert self.fp8.positions == self.full.positions

    def rewind(self, keep_sink: bool) -> None:
        for cache in (self.full, self.fp8):
            cache.rewind(keep_sink)


@settings(max_examples=300, deadline=None)
@given(settings_of_a_video(), st.booleans())
def test_cache_holds_what_a_kv_cache_holds(setting, relative):
    pair, position = Pair(setting, relative), 0
    for switch, passes in zip(setting.switches, setting.passes, strict=True):
        if switch and position > 0:  # as Session re-caches
            window = setting.window
            keep = setting.global_sink and window is not None and position > window
            frames = min(position, window or position) - (setting.sink if keep else 0)
            pair.rewind(keep)
            pair.write(position - frames, frames, 1)
        pair.write(position, setting.block, passes)
        position += setting.block


def test_turned_sink_is_rounded_once_however_often_it_turns():
    setting = Setting(3, 9, 3, tokens=2, heads=2, head_dim=12, dtype=torch.float32, switches=(), passes=(),
                      global_sink=True, seed=0)
    pair = Pair(setting, relative=True)
    for block in range(60):
        pair.write(3 * block, 3, passes=1)


@pytest.mark.parametrize("window", [12, None])
def test_cache_takes_half_the_memory(window):
    caches = [new_cache(kind, dtype=torch.bfloat16, window=window) for kind in (KVCache, QuantisedKVCache)]
    for cache in caches:
        cache.begin(0, 12)
    sizes = [sum(x.untyped_storage().nbytes() for x in (*cache.keys, *cache.values)) for cache in caches]
    assert sizes[0] == 2 * sizes[1]
    assert sum(x.untyped_storage().nbytes() for x in caches[1].key_scales) <= sizes[1] / 32  # 4 bytes to 2·64


@pytest.mark.parametrize("tokens", [1, 7, 20])
@pytest.mark.parametrize("window", [12, None])
def test_rows_of_values_begin_where_a_gpu_can_copy_them(tokens, window):
    cache = new_cache(tokens=tokens, window=window)
    for block in range(4):
        cache.begin(3 * block, 3)
        x = draw(1, 3 * tokens, 2, 64)
        held = cache.update(0, x, x)
        assert held.values.stride()[-1] == 1 and all(stride % 16 == 0 for stride in held.values.stride()[:-1])
        assert held.keys.stride()[1:] == (128, 64, 1)
        assert held.key_scale.stride()[2] == 1 and all(stride % 4 == 0 for stride in held.key_scale.stride()[:-1])


@pytest.mark.parametrize("relative_rope", [False, True])
def test_fused_write_is_norm_rope_and_update(relative_rope):
    rope = RotaryEmbedding(64, 4, 5, "cpu")
    norm = nn.RMSNorm(128, eps=1e-6)
    norm.weight.data = draw(128)
    caches = [new_cache(rope=rope if relative_rope else None) for _ in range(2)]
    for block in range(6):
        k, v = with_outliers(1, 60, 128, seed=block), draw(1, 60, 2, 64, seed=block)
        turns = rope.turns(3 * block, 3)
        for cache in caches:
            cache.begin(3 * block, 3)
        one = caches[0].write(0, k, v, norm, turns)
        other = caches[1].update(0, rms_rope(k, norm.weight, norm.eps, turns), v)
        for a, b in zip(one[:4], other[:4], strict=True):
            assert torch.equal(a.float(), b.float())


def test_scales_are_each_samples_own():
    """A video does not depend on its neighbours in the batch."""
    k, v = with_outliers(2, 60, 2, 64), with_outliers(2, 60, 2, 64, seed=3)
    both, alone = new_cache(batch=2), new_cache()
    for cache in (both, alone):
        cache.begin(0, 3)
    of_both, of_one = both.update(0, k, v), alone.update(0, k[1:], v[1:])
    for a, b in zip(of_both[2:4], of_one[2:4], strict=True):
        torch.testing.assert_close(a[1:], b)
    assert (of_both.keys[1:].int() - of_one.keys.int()).abs().max() <= 1  # one that lies between two steps
    assert relative(of_both.values[1:].float(), of_one.values.float()) < 0.001
