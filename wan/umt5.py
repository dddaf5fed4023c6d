"""UMT5's encoder, under the names that transformers' UMT5EncoderModel has for its weights.

That one is not used: importing transformers takes longer than making the first frames of a video.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UMT5Config:
    """Sizes in transformers' words; the defaults are those of UMT5-XXL."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class UMT5Encoder(nn.Module):
    """T5's encoder, but that each layer has its own bias by distance. Nothing is masked, and nothing dropped."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.shared = _table(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [N, L] → embeddings [N, L, d_model]."""
        return self.encoder(ids)


class Stack(nn.Module):
    def __init__(self, config: UMT5Config, embedding: nn.Embedding):
        super().__init__()
        self.embed_tokens = embedding
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = Norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for block in self.block:
            x = block(x)
        return self.final_layer_norm(x)


class Block(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = _finite(x + layer(x))
        return x


class AttentionLayer(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.layer_norm, self.SelfAttention = Norm(config), Attention(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.SelfAttention(self.layer_norm(x))


class FeedForwardLayer(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.layer_norm, self.DenseReluDense = Norm(config), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.DenseReluDense(self.layer_norm(x))


class Norm(nn.Module):
    """RMSNorm, its mean square in float32."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(_gelu(self.wi_0(x)) * self.wi_1(x))


class Attention(nn.Module):
    """Attention without a scale, with a bias by distance."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.heads = config.num_heads
        self.buckets, self.furthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = _table(self.buckets, config.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, d_model] → the same."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(x.shape[1]), scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))

    def bias(self, length: int) -> Tensor:
        """[1, heads, L, L]: what a query adds to each key's score."""
        position = torch.arange(length, device=self.relative_attention_bias.weight.device)
        return self.relative_attention_bias(self._bucket(position - position[:, None])).permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Which row of the table each distance has: the upper half is for keys to the right; of each half, one half
        for near keys, a row each, and one for far ones, by the logarithm of their distance."""
        half = self.buckets // 2
        near, far = half // 2, distance.abs()
        grown = torch.log(far.float() / near) / math.log(self.furthest / near) * (half - near)
        return half * (distance > 0) + torch.where(far < near, far, (near + grown.long()).clamp(max=half - 1))


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding without values. PyTorch would draw some, and on the meta device import its compiler for that."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


def _gelu(x: Tensor) -> Tensor:
    """By tanh, and rounded to the dtype of x at each step as it was when Wan was trained; `F.gelu` rounds once."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _finite(x: Tensor) -> Tensor:
    """float16 may overflow in a deep layer; clamped then."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), most - 1000, most)
    return x.clamp(-limit, limit)
