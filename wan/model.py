"""CausalWan: the transformer of Wan 2.1 (arXiv:2503.20314), run on one block of latents at a time over a K/V cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.attention import attention, fastest
from wan.kernels import add_modulate, gated, gated_norm, linear, linear_gelu, modulate, rms_rope, rms_rope_both
from wan.kv_cache import KVCache
from wan.rope import RotaryEmbedding


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the transformer; the defaults are Wan 2.1 T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos(t·ω), sin(t·ω)] in float64, ω_i = 10000^(−i/half), half = dim/2. t [...] → [..., dim]."""
    half = dim // 2
    speeds = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * speeds
    return torch.cat([angles.cos(), angles.sin()], -1)


class Attention(nn.Module):
    """q, k, v, o with biases; q and k are RMS-normed over the whole dim before they are split into heads."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """x [B, S, dim] → [B, S, H, D]."""
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    def remember(self, x: Tensor, turns: Tensor, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of x [B, S, dim]. Returns all that the cache holds."""
        keys, values = cache.room(layer)
        k = rms_rope(self.k(x), self.norm_k.weight, self.norm_k.eps, turns, out=keys)
        return cache.update(layer, k, self._values(x, values))

    def forward(self, x: Tensor, turns: Tensor, cache: KVCache, layer: int) -> Tensor:
        """x [B, S, dim] attends to all that the cache holds, x itself included."""
        keys, values = cache.room(layer)
        q, k = rms_rope_both(self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, self.norm_k.eps, turns,
                             out=keys)
        k, v = cache.update(layer, k, self._values(x, values))
        return self.o(attention(q, k, v).flatten(-2))

    def _values(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, S, dim] → [B, S, H, D], in `out` where it can be."""
        return self.heads(linear(x, self.v.weight, self.v.bias, out.flatten(-2)))


class CrossAttention(Attention):
    def key_value(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, text_len, dim] → k, v [B, text_len, H, D]."""
        return self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, dim] attends to the prompt's keys and values, each [B, text_len, H, D]."""
        return self.o(attention(self.heads(self.norm_q(self.q(x))), *text).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def remember(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: KVCache, layer: int) -> None:
        """All that later blocks see of x [B, F, L, dim] in this layer: its keys and values."""
        shift, scale, *_ = modulation.split(1, dim=2)
        self.self_attn.remember(modulate(x, shift, scale, self.eps).flatten(1, 2), turns, cache, layer)

    def forward(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: KVCache, layer: int,
                text: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, F, L, dim], modulation, this block's own and that of the timesteps added, [B, F, 6, dim]
        → [B, F, L, dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=2)
        frames = x.shape[1]
        y = self.self_attn(modulate(x, shift1, scale1, self.eps).flatten(1, 2), turns, cache, layer)
        x, y = gated_norm(x, gate1, y.unflatten(1, (frames, -1)), self.norm3.weight, self.norm3.bias, self.eps)
        y = self.cross_attn(y.flatten(1, 2), text)
        x, y = add_modulate(x, y.unflatten(1, (frames, -1)), shift2, scale2, self.eps)
        wide, narrow = self.ffn[0], self.ffn[2]
        return gated(x, gate2, narrow(linear_gelu(y, wide.weight, wide.bias)))


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        pt, ph, pw = config.patch_size
        self.head = nn.Linear(config.dim, pt * ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + e[:, :, None]).split(1, dim=2)
        return self.head(modulate(x, shift, scale, self.eps))


class CausalWan(nn.Module):
    """Predicts the flow of a block of latents, given what the cache holds of those before it.

    Parameters have Wan's native names, so released checkpoints load as they are.
    """

    cache_type: type[KVCache] = KVCache  # of the cache that it is run over

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def encode_text(self, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of a prompt, per layer [B, text_len, H, D].

        embeds [B, n ≤ text_len, text_dim] is what the text encoder returns; it is padded with zeros to text_len rows,
        all of which are attended to, as Wan was trained.
        """
        embeds = F.pad(embeds, (0, 0, 0, self.config.text_len - embeds.shape[1]))
        text = self.text_embedding(embeds.to(self.patch_embedding.weight.dtype))
        return [block.cross_attn.key_value(text) for block in self.blocks]

    def forward(self, latents: Tensor, t: float, position: int, rope: RotaryEmbedding, cache: KVCache,
                text: list[tuple[Tensor, Tensor]], want_flow: bool = True) -> Tensor | None:
        """Flow [B, F, C, h, w] of noisy latents [B, F, C, h, w] at timestep t (0 clean … 1000 noise).

        The latents are the frames `position …` of the video; their keys and values go to the slots that
        `cache.begin` picked. Returned in the dtype of `latents`. Without `want_flow` they only go there: None is
        returned, and the last layer does no more than that takes.
        """
        times = torch.full(latents.shape[:2], t, dtype=torch.float64, device=latents.device)
        return self.flow(latents, times, rope.turns(position, latents.shape[1]), cache, text, want_flow)

    def flow(self, latents: Tensor, times: Tensor, turns: Tensor, cache: KVCache, text: list[tuple[Tensor, Tensor]],
             want_flow: bool = True) -> Tensor | None:
        """`forward` for a timestep for each latent, times [B, F], and turns [F·L, D/2] of RoPE: it only computes with
        tensors, so that it can be captured as a CUDA graph."""
        weight = self.patch_embedding.weight
        x = self.patch_embedding(latents.to(weight.dtype).transpose(1, 2))
        x = rearrange(x, "b d f h w -> b f (h w) d")
        e = self.time_embedding(sinusoid(times, self.config.freq_dim).to(weight.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        # Of all layers at once: one small kernel in place of one for each.
        modulations = torch.stack([block.modulation for block in self.blocks])[:, :, None] + e0
        with fastest(x.device):
            for layer, block in enumerate(self.blocks):
                if layer + 1 == len(self.blocks) and not want_flow:
                    return block.remember(x, modulations[layer], turns, cache, layer)
                x = block(x, modulations[layer], turns, cache, layer, text[layer])
        _, ph, pw = self.config.patch_size
        height = latents.shape[-2] // ph
        x = rearrange(self.head(x, e), "b f (h w) (p q c) -> b f c (h p) (w q)", h=height, p=ph, q=pw)
        return x.to(latents.dtype)
