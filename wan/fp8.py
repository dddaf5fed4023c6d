"""The transformer's blocks with 8 bits, where that is faster: the linear layers of q, k, v and the feed-forward
multiply int8, self-attention multiplies what the K/V cache holds, int8 keys and e4m3 values. Square layers stay as they
are: to round what goes into them would take longer than a product of 8 bits saves."""

import torch
from torch import Tensor, nn

from wan.fp8_cache import QuantisedKVCache
from wan.kernels import gated, gated_norm
from wan.kernels.fp8 import (
    Rows,
    add_modulate_quantise,
    attention,
    gelu_quantise,
    linear,
    modulate_quantise,
    quantise,
    rms_rope_quantise,
    smoothing,
)
from wan.model import Block, CausalWan, SelfAttention


class Int8Linear(nn.Module):
    """Linear layers of one input, their outputs side by side. Weights are int8, with a scale for each output."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        full = torch.cat([layer.weight.detach() for layer in layers])
        self.register_buffer("smooth", smoothing(full))  # [C], of what x is to be multiplied by before it is rounded
        weight = quantise(full.float() / self.smooth)
        self.register_buffer("weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]))

    def forward(self, x: Tensor | Rows, skip: int = 0) -> Tensor:
        """x [..., C] → [..., C'], without the first `skip` outputs."""
        x = x if isinstance(x, Rows) else quantise(x, self.smooth)
        return linear(x, Rows(self.weight[skip:], self.scale[skip:]), self.bias[skip:])


class Fp8SelfAttention(nn.Module):
    def __init__(self, full: SelfAttention):
        super().__init__()
        self.head_dim = full.head_dim
        self.qkv = Int8Linear(full.q, full.k, full.v)
        self.o = full.o
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
    """A Block whose cross-attention stays as it was."""

    def __init__(self, full: Block):
        super().__init__()
        self.eps, self.modulation = full.eps, full.modulation
        self.self_attn = Fp8SelfAttention(full.self_attn)
        self.norm3, self.cross_attn = full.norm3, full.cross_attn
        self.wide, self.narrow = Int8Linear(full.ffn[0]), Int8Linear(full.ffn[2])

    def remember(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: QuantisedKVCache, layer: int) -> None:
        """As Block.remember."""
        shift, scale, *_ = modulation.split(1, dim=2)
        y = modulate_quantise(x, shift, scale, self.eps, self.self_attn.qkv.smooth)
        self.self_attn.remember(y, turns, cache, layer)

    def forward(self, x: Tensor, modulation: Tensor, turns: Tensor, cache: QuantisedKVCache, layer: int,
                text: tuple[Tensor, Tensor]) -> Tensor:
        """As Block.forward."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=2)
        y = modulate_quantise(x, shift1, scale1, self.eps, self.self_attn.qkv.smooth)
        y = self.self_attn(y, turns, cache, layer)
        x, y = gated_norm(x, gate1, y.view_as(x), self.norm3.weight, self.norm3.bias, self.eps)
        y = self.cross_attn(y.flatten(1, 2), text)
        x, y = add_modulate_quantise(x, y.view_as(x), shift2, scale2, self.eps, self.wide.smooth)
        return gated(x, gate2, self.narrow(gelu_quantise(self.wide(y), self.narrow.smooth)).view_as(x))


def to_fp8(model: CausalWan, device: torch.device) -> CausalWan:
    """`model` itself, its blocks with 8 bits and on `device`, and its cache to match. On a CPU all of it is computed by
    the plain versions, which are slow: a reference for what a GPU computes."""
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Fp8Block(block.to(device))
    model.cache_type = QuantisedKVCache
    return model
