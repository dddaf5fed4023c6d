"""CausalWan against the same transformer written out plainly: all latents at once, under a mask, no cache."""

import math

import pytest
import torch
from torch import Tensor

from demo.random_weights import randomise
from tests.conftest import GOLDEN
from utils.checkpoint import read, read_json
from wan.kv_cache import KVCache
from wan.model import CausalWan, WanConfig
from wan.rope import RotaryEmbedding

CONFIG = WanConfig(dim=24, ffn_dim=40, freq_dim=16, text_dim=10, text_len=12, in_dim=4, out_dim=4, num_heads=2,
                   num_layers=3)
BLOCK, FRAMES, HEIGHT, WIDTH = 2, 10, 4, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2
TOKENS = ROWS * COLUMNS


def make_model(dtype: torch.dtype = torch.float64) -> CausalWan:
    """Every parameter is random, weights of norms, biases and modulations too."""
    with torch.device("meta"):
        model = CausalWan(CONFIG)
    random = torch.Generator().manual_seed(0)
    state = randomise(model, "cpu", random)
    state = {name: value + 0.2 * torch.randn(value.shape, generator=random) if value.dim() == 1 else value
             for name, value in state.items()}
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return model.requires_grad_(False)


MODEL = make_model()


def random_inputs(batch: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Latents [batch, FRAMES, C, h, w] and a prompt's embeddings [batch, n, text_dim]."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH, dtype=dtype, generator=random)
    return latents, torch.randn(batch, 7, CONFIG.text_dim, dtype=dtype, generator=random)


def slide(model: CausalWan, latents: Tensor, embeds: Tensor, t: float, window: int | None = None, sink: int = 0,
          passes: int = 1) -> Tensor:
    """Flow of all the latents, block by block over a cache."""
    rope = RotaryEmbedding(CONFIG.head_dim, ROWS, COLUMNS, "cpu")
    cache = KVCache(layers=CONFIG.num_layers, batch=len(latents), tokens=TOKENS, heads=CONFIG.num_heads,
                    head_dim=CONFIG.head_dim, window=window, sink=sink, dtype=model.patch_embedding.weight.dtype,
                    device="cpu")
    text = model.encode_text(embeds)
    flows = []
    for position in range(0, FRAMES, BLOCK):
        cache.begin(position, BLOCK)
        block = latents[:, position : position + BLOCK]
        for again in range(passes, 0, -1):  # noisier passes before the last leave nothing behind
            flow = model(block * again, t * again, position, rope, cache, text)
        flows.append(flow)
    return torch.cat(flows, 1)


def layer_norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + CONFIG.eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_flow(p: dict[str, Tensor], latents: Tensor, embeds: Tensor, t: float, mask: Tensor) -> Tensor:
    """The design's equations for one video: latents [FRAMES, C, h, w], embeds [n, text_dim]; mask [query latent, key
    latent] is true where there is attention. Nothing here is shared with the model's own code."""
    heads, head_dim = CONFIG.num_heads, CONFIG.head_dim

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.eps).sqrt() * p[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        pairs = head_dim // 2
        axes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        where = [(f, r, c) for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
        angles = torch.tensor([[at * 10000 ** (-j / n) for at, n in zip(place, axes, strict=True) for j in range(n)]
                               for place in where], dtype=torch.float64)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, -1).flatten(-2)

    def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), v).flatten(1)

    def attention(x: Tensor, other: Tensor, name: str, turn, allowed: Tensor) -> Tensor:
        q = turn(rms_norm(linear(x, f"{name}.q"), f"{name}.norm_q").unflatten(-1, (heads, head_dim)))
        k = turn(rms_norm(linear(other, f"{name}.k"), f"{name}.norm_k").unflatten(-1, (heads, head_dim)))
        v = linear(other, f"{name}.v").unflatten(-1, (heads, head_dim))
        return linear(attend(q, k, v, allowed), f"{name}.o")

    patches = [latents[f, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
               for f in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)]
    x = torch.stack([torch.einsum("chw,dchw->d", patch, p["patch_embedding.weight"][:, :, 0]) for patch in patches])
    x = x + p["patch_embedding.bias"]

    half = CONFIG.freq_dim // 2
    angles = torch.tensor([t * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    e = linear(silu(linear(torch.cat([angles.cos(), angles.sin()]), "time_embedding.0")), "time_embedding.2")
    e0 = linear(silu(e), "time_projection.1").unflatten(-1, (6, CONFIG.dim))

    text = torch.zeros(CONFIG.text_len, CONFIG.text_dim, dtype=torch.float64)
    text[: len(embeds)] = embeds
    text = linear(gelu(linear(text, "text_embedding.0")), "text_embedding.2")

    between_tokens = mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    for i in range(CONFIG.num_layers):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = p[f"{name}.modulation"][0] + e0
        y = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * attention(y, y, f"{name}.self_attn", turn, between_tokens)
        y = layer_norm(x) * p[f"{name}.norm3.weight"] + p[f"{name}.norm3.bias"]
        x = x + attention(y, text, f"{name}.cross_attn", lambda q: q, torch.ones(len(x), len(text), dtype=torch.bool))
        y = layer_norm(x) * (1 + scale2) + shift2
        x = x + gate2 * linear(gelu(linear(y, f"{name}.ffn.0")), f"{name}.ffn.2")

    shift, scale = p["head.modulation"][0] + e
    x = linear(layer_norm(x) * (1 + scale) + shift, "head.head")
    flow = torch.empty_like(latents)
    for token, numbers in enumerate(x):
        f, r, c = token // TOKENS, token % TOKENS // COLUMNS, token % COLUMNS
        flow[f, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = numbers.reshape(2, 2, CONFIG.out_dim).permute(2, 0, 1)
    return flow


def attended(window: int | None, sink: int) -> Tensor:
    """[query latent, key latent]: does a block attend to the latent? To the sink and to the newest others."""
    mask = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for query in range(FRAMES):
        end = query // BLOCK * BLOCK + BLOCK
        for key in range(end):
            mask[query, key] = window is None or key < sink or key >= end - (window - sink)
    return mask


@pytest.mark.parametrize("t", [0, 625.0, 1000.0])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (10, 2), (6, 2), (6, 4), (4, 0), (2, 0)])
def test_sliding_over_a_cache_is_one_masked_forward(window, sink, t):
    latents, embeds = random_inputs()
    got = slide(MODEL, latents, embeds, t, window, sink)
    expected = plain_flow(MODEL.state_dict(), latents[0], embeds[0], t, attended(window, sink))
    assert expected.std() > 0.1
    assert (got[0] - expected).abs().max() < 1e-5  # RoPE is in float32
    if (window, sink) == (6, 2):
        other = plain_flow(MODEL.state_dict(), latents[0], embeds[0], t, attended(None, 0))
        assert (other - expected).abs().max() > 1e-2


def test_float32_is_near_float64():
    latents, embeds = random_inputs()
    exact = slide(MODEL, latents, embeds, 500.0, 6, 2)
    got = slide(make_model(torch.float32), latents.float(), embeds.float(), 500.0, 6, 2)
    assert got.dtype == torch.float32 and (got - exact).abs().max() < 1e-4


def test_bfloat16_is_near_float32_and_keeps_the_dtype_of_the_latents():
    latents, embeds = random_inputs(dtype=torch.float32)
    exact = slide(MODEL, latents.double(), embeds.double(), 500.0, 6, 2)
    got = slide(make_model(torch.bfloat16), latents, embeds, 500.0, 6, 2)
    assert got.dtype == torch.float32
    assert (got - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


def test_earlier_passes_of_a_block_leave_nothing_behind():
    latents, embeds = random_inputs()
    once = slide(MODEL, latents, embeds, 250.0, 6, 2)
    assert torch.equal(slide(MODEL, latents, embeds, 250.0, 6, 2, passes=3), once)


def test_a_pass_without_flow_writes_the_same_keys_and_values():
    latents, embeds = random_inputs()
    rope, text = RotaryEmbedding(CONFIG.head_dim, ROWS, COLUMNS, "cpu"), MODEL.encode_text(embeds)
    full, short = (KVCache(layers=CONFIG.num_layers, batch=1, tokens=TOKENS, heads=CONFIG.num_heads,
                           head_dim=CONFIG.head_dim, window=2 * BLOCK, sink=0, dtype=torch.float64, device="cpu")
                   for _ in range(2))
    for position in (0, BLOCK):
        block = latents[:, position : position + BLOCK]
        for cache, want_flow in ((full, True), (short, False)):
            cache.begin(position, BLOCK)
            flow = MODEL(block, 250.0, position, rope, cache, text, want_flow)
            assert (flow is not None) == want_flow
    for got, expected in zip(short.keys + short.values, full.keys + full.values, strict=True):
        assert torch.equal(got, expected)


def test_batch_of_two_is_two_single_runs():
    latents, embeds = random_inputs(batch=2)
    together = slide(MODEL, latents, embeds, 500.0, 6, 2)
    for sample in range(2):
        alone = slide(MODEL, latents[sample : sample + 1], embeds[sample : sample + 1], 500.0, 6, 2)
        assert (together[sample : sample + 1] - alone).abs().max() < 1e-12
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_text_is_padded_with_zeros_to_512_rows(rows):
    with torch.device("meta"):
        empty = CausalWan(WanConfig(dim=16, ffn_dim=16, freq_dim=8, text_dim=10, num_heads=2, num_layers=2))
    state = randomise(empty, "cpu", torch.Generator().manual_seed(0))
    empty.load_state_dict(state, assign=True)
    embeds = torch.randn(2, rows, 10, generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(2, 512, 10)
    padded[:, :rows] = embeds
    for short, full in zip(empty.encode_text(embeds), empty.encode_text(padded), strict=True):
        for got, expected in zip(short, full, strict=True):
            assert got.shape == (2, 512, 2, 8) and torch.equal(got, expected)


def test_prompt_reaches_the_flow():
    latents, embeds = random_inputs()
    assert (slide(MODEL, latents, embeds, 500.0) - slide(MODEL, latents, embeds + 1, 500.0)).abs().max() > 1e-3


def test_names_and_shapes_are_those_of_the_released_checkpoint():
    state = read(GOLDEN / "longlive_base.pt")["generator"]
    with torch.device("meta"):
        model = CausalWan(WanConfig(**read_json(GOLDEN / "generator_config.json")))
    assert {f"model.{name}": value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in state.items()}


def test_full_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        state = CausalWan(WanConfig()).state_dict()
    assert len(state) == 825
    assert 5.6e9 < sum(4 * value.numel() for value in state.values()) < 5.8e9  # bytes of longlive_base.pt, float32
