"""The generator on all blocks of a clip at once, for training: what it computes block by block over a K/V cache when it
makes a video (`CausalWan.forward`), here for every block in parallel, with gradients.

Teacher forcing: of a clip of n blocks there are the clean blocks 0 … n−2 and some noisy copies of blocks 0 … n−1.
A block attends to itself, whole, and to the clean blocks that the cache would hold: the sink and the latest ones.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wan.model import Block, CausalWan, sinusoid
from wan.rope import RotaryEmbedding


class Plan:
    """Who attends to whom. `number` of each of the G entries: which block of the clip it is; the clean ones are first,
    then `draws` noisy copies of all blocks.

    window and sink are in blocks; the window includes the block itself.
    """

    def __init__(self, blocks: int, draws: int, *, window: int, sink: int, rope: RotaryEmbedding, frames: int):
        self.clean, self.blocks = blocks - 1, blocks
        self.number = [*range(self.clean), *(list(range(blocks)) * draws)]
        self.pasts = [[j for j in range(block) if j < sink or j > block - (window - sink)] for block in range(blocks)]
        angles = torch.stack([rope.turns(frames * block, frames) for block in self.number])
        self.cos, self.sin = angles.real.contiguous(), angles.imag.contiguous()  # [G, S, D/2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, G, S, H, D] → [B, G, S, H, D]. The entries of one block go together: they have one past, so no
        mask is needed. Made of slices, whose gradients are sums of slices, and so fast."""
        made = [None] * len(self.number)
        for block, past in enumerate(self.pasts):
            entries = [entry for entry, number in enumerate(self.number) if number == block]
            queries = torch.stack([q[:, entry] for entry in entries], 1).flatten(0, 1)
            keys, values = (torch.stack([torch.cat([x[:, j] for j in (*past, entry)], 1) for entry in entries], 1)
                            .flatten(0, 1) for x in (k, v))
            y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (queries, keys, values)))
            y = y.transpose(1, 2).unflatten(0, (len(q), -1))
            for i, entry in enumerate(entries):
                made[entry] = y[:, i]
        return torch.stack(made, 1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, G, S, H, D] by cos, sin [G, S, D/2]."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).to(x.dtype)


def _block(block: Block, x: Tensor, e0: Tensor, text: Tensor, plan: Plan) -> Tensor:
    """One transformer block. x [B, G, F, L, dim], e0 [B, G, 1, 6, dim], text [B, n, dim]."""
    eps, attn, cross = block.eps, block.self_attn, block.cross_attn
    modulation = (block.modulation + e0).to(x.dtype)  # under autocast x stays in half precision
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(4).unbind(3)
    width = x.shape[-1:]
    y = (F.layer_norm(x, width, eps=eps) * (1 + scale1) + shift1).flatten(2, 3)
    q, k = (_turn(attn.heads(norm(linear(y))), plan.cos, plan.sin)
            for norm, linear in ((attn.norm_q, attn.q), (attn.norm_k, attn.k)))
    y = attn.o(plan.attend(q, k.to(q.dtype), attn.heads(attn.v(y)).to(q.dtype)).flatten(-2))
    x = x + gate1 * y.view_as(x)
    y = cross.heads(cross.norm_q(cross.q(block.norm3(x)))).flatten(1, 3)  # [B, G·S, H, D]
    k, v = (part.transpose(1, 2).to(y.dtype) for part in cross.key_value(text))
    y = F.scaled_dot_product_attention(y.transpose(1, 2), k, v).transpose(1, 2)
    x = x + cross.o(y.flatten(-2)).view_as(x)
    y = F.layer_norm(x, width, eps=eps) * (1 + scale2) + shift2
    return x + gate2 * block.ffn(y)


class Parallel:
    """`forward` for one plan; `compiled` where PyTorch's compiler is to fuse it."""

    def __init__(self, model: CausalWan, plan: Plan, compiled: bool = False):
        self.model, self.plan = model, plan
        self.block = torch.compile(_block, dynamic=False) if compiled else _block

    def __call__(self, latents: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """latents [B, G, F, C, h, w] at timesteps t [B, G], embeds [B, n, text_dim] → flow of the same shape as
        latents, of the noisy entries only."""
        model, plan = self.model, self.plan
        batch, entries, frames, _, height, _ = latents.shape
        x = model.patch_embedding(latents.flatten(0, 1).transpose(1, 2))
        x = rearrange(x, "(b g) d f h w -> b g f (h w) d", b=batch).contiguous()
        e = model.time_embedding(sinusoid(t, model.config.freq_dim).to(model.patch_embedding.weight.dtype))
        e0 = model.time_projection(e).unflatten(-1, (6, -1))[:, :, None]
        embeds = F.pad(embeds, (0, 0, 0, model.config.text_len - embeds.shape[1]))
        text = model.text_embedding(embeds)
        for block in model.blocks:
            x = self.block(block, x, e0, text, plan)
        x = x[:, plan.clean:].flatten(0, 1)
        e = e[:, plan.clean:, None].expand(-1, -1, frames, -1).flatten(0, 1)
        _, ph, pw = model.config.patch_size
        x = rearrange(model.head(x, e), "n f (h w) (p q c) -> n f c (h p) (w q)", h=height // ph, p=ph, q=pw)
        return x.unflatten(0, (batch, entries - plan.clean))
