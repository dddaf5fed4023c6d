"""The transformer's blocks in FP8: their linear layers, self-attention and K/V cache hold and multiply e4m3."""

import torch
from torch import Tensor, nn

from wan.fp8_cache import QuantisedKVCache
from wan.kernels import gated
from wan.kernels.fp8 import (
    Rows,
    add_modulate_quantise,
    attention,
    gelu_quantise,
    linear,
    modulate_quantise,
    quantise,
    rms_rope_quantise,
)
from wan.model import Block, CausalWan, SelfAttention


class Fp8Linear(nn.Module):
    """Linear layers of one input, their outputs side by side. Weights are e4m3, with a scale for each output."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        weight = quantise(torch.cat([layer.weight.detach() for layer in layers]))
        self.register_buffer("weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor | Rows, skip: int = 0) -> Tensor:
        """x [..., C] → [..., C'], without the first `skip` outputs."""
        x = x if isinstance(x, Rows) else quantise(x)
        return linear(x, Rows(self.weight[skip:], self.scale[skip:]), self.bias[skip:])


class Fp8SelfAttention(nn.Module):
    def __init__(self, full: SelfAttention):
        super().__init__()
        self.head_dim = full.head_dim
        self.qkv = Fp8Linear(full.q, full.k, full.v)
        self.o = Fp8Linear(full.o)
        self.norm_q, self.norm_k = full.norm_q, full.norm_k

    def heads(self, x: Tensor) -> Tensor:
        """x [B, S, dim] → [B, S, H, D]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def remember(self, x: Rows, turns: Tensor, cache: QuantisedKVCache, layer: int) -> None:
        """Writes the keys and values of x [B, S, dim]."""
        k, v = self.qkv(x, skip=x.values.shape[-1]).chunk(2, -1)
        cache.write(layer, k, self.heads(v), self.norm_k, turns)

    def forward(self, x: Rows, turns: Tensor, cache: QuantisedKVCache, layer: int) -> Tensor:
        """x [B, S, dim] attends to all that the cache holds, x itself included."""
        q, k, v = self.qkv(x).chunk(3, -1)
        held = cache.write(layer, k, self.heads(v), self.norm_k, turns)
        q8 = rms_rope_quantise(q, self.norm_q.weight, self.norm_q.eps, turns)
        return self.o(attention(q8, held, q.dtype).flatten(-2))


class Fp8Block(nn.Module):
    """A Block, of which only the keys and values of the prompt stay as they were; they are made once a prompt."""

    def __init__(self, full: Block):
        super().__init__()
        self.eps, self.modulation = full.eps, full.modulation
        self.self_attn = Fp8SelfAttention(full.self_attn)
        # An affine LayerNorm is one without weights, modulated.
        self.register_buffer("shift3", full.norm3.bias.detach().float()[None, None, None])
        self.register_buffer("scale3", full.norm3.weight.detach().float()[None, None, None] - 1)
        self.cross_attn = full.cross_attn
        self.cross_attn.q, self.cross_attn.o = Fp8Linear(full.cross_attn.q), Fp8Linear(full.cross_attn.o)
        self.wide, self.narrow = Fp8Linear(full.ffn[0]), Fp8Linear(full.ffn[2])

    def remember(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: QuantisedKVCache, layer: int) -> None:
        """As Block.remember."""
        shift, scale, *_ = modulation.split(1, dim=2)
        self.self_attn.remember(modulate_quantise(x, shift, scale, self.eps), turns, cache, layer)

    def forward(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: QuantisedKVCache, layer: int,
                text: tuple[Tensor, Tensor]) -> Tensor:
        """As Block.forward."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=2)
        y = self.self_attn(modulate_quantise(x, shift1, scale1, self.eps), turns, cache, layer)
        x, y = add_modulate_quantise(x, gate1, y.view_as(x), self.shift3, self.scale3, self.eps)
        y = self.cross_attn(y, text)
        x, y = add_modulate_quantise(x, None, y.view_as(x), shift2, scale2, self.eps)
        return gated(x, gate2, self.narrow(gelu_quantise(self.wide(y))).view_as(x))


def to_fp8(model: CausalWan, device: torch.device) -> CausalWan:
    """`model` itself, its blocks in FP8 and on `device`, and its cache to match. On a CPU all of it is computed by the
    plain versions, which are slow: a reference for what a GPU computes."""
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Fp8Block(block.to(device))
    model.cache_type = QuantisedKVCache
    return model
