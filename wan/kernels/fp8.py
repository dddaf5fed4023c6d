"""What the transformer does in FP8 (e4m3). On a GPU these are `torch._scaled_mm` and Triton kernels; the plain versions
beside them round to e4m3 in the same places and compute in float32.

e4m3 is a floating-point format: where a value is neither above 448 nor below 2^-6 in size, its rounding error is up to
1/16 of it, whatever the scale. Scales need not be tight, only safe.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.kernels import gated_plain, modulate_plain, rms_rope_plain

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448; beyond it a cast gives NaN
HEAD_DIMS = (64, 128)  # of `attention` on a GPU
LEAST = 1e-12  # of what a scale is made of, so that a row of zeros has one


class Rows(NamedTuple):
    """x [..., C] as values·scale: e4m3 [..., C] and float32 [..., 1]."""

    values: Tensor
    scale: Tensor


class Held(NamedTuple):
    """The keys and values to attend to. Keys are keys·key_scale, but for a vector that all keys of a head lack;
    values are values·value_scale, each channel's in one piece, as the tensor cores want them."""

    keys: Tensor  # e4m3 [B, S, H, D]
    values: Tensor  # e4m3 [B, H, D, S]
    key_scale: Tensor  # float32 [B, H]
    value_scale: Tensor  # float32 [B, H]


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded; where x is too large for the format, its largest value."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def scale_of(x: Tensor, dims: tuple[int, ...] | int, headroom: float = 1.0) -> Tensor:
    """What x is to be divided by for its largest value along `dims`, kept with size 1, to be 448/headroom."""
    return x.abs().amax(dims, keepdim=True).float().clamp_min(LEAST) * (headroom / LARGEST)


def quantise(x: Tensor) -> Rows:
    """x [..., C], each row with a scale of its own."""
    if x.is_cuda:
        from wan.kernels import triton_fp8  # not before: Triton needs a GPU driver

        return Rows(*triton_fp8.quantise(x, gelu=False))
    return quantise_plain(x)


def quantise_plain(x: Tensor) -> Rows:
    scale = scale_of(x, -1)
    return Rows(to_e4m3(x.float() / scale), scale)


def gelu_quantise(x: Tensor) -> Rows:
    """GELU by tanh, then `quantise`. x [..., C]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        return Rows(*triton_fp8.quantise(x, gelu=True))
    return gelu_quantise_plain(x)


def gelu_quantise_plain(x: Tensor) -> Rows:
    return quantise_plain(F.gelu(x.float(), approximate="tanh"))


def add_modulate_quantise(x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor,
                          eps: float) -> tuple[Tensor, Rows]:
    """x + gate·y, or x + y, and `modulate_quantise` of that. y as x, gate [B, F, 1, dim]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        x, *rows = triton_fp8.modulate_quantise(x, shift, scale, eps, y, gate)
        return x, Rows(*rows)
    return add_modulate_quantise_plain(x, gate, y, shift, scale, eps)


def add_modulate_quantise_plain(x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor,
                                eps: float) -> tuple[Tensor, Rows]:
    x = x + y if gate is None else gated_plain(x, gate, y)
    return x, modulate_quantise_plain(x, shift, scale, eps)


def modulate_quantise(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rows:
    """`wan.kernels.modulate`, then `quantise`. x [B, F, L, dim], shift and scale [B or 1, F or 1, 1, dim]
    → [B, F·L, dim]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        _, *rows = triton_fp8.modulate_quantise(x, shift, scale, eps)
        return Rows(*rows)
    return modulate_quantise_plain(x, shift, scale, eps)


def modulate_quantise_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rows:
    return quantise_plain(modulate_plain(x.float(), shift.float(), scale.float(), eps).flatten(1, 2))


def linear(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [C', C], bias [C'] → [..., C'] in the dtype of the bias, which must be
    bfloat16 on a GPU; there C and C' must be multiples of 16."""
    if x.values.is_cuda:
        rows = x.values.flatten(0, -2)
        y = torch._scaled_mm(rows, weight.values.t(), scale_a=x.scale.view(-1, 1), scale_b=weight.scale.view(1, -1),
                             bias=bias, out_dtype=bias.dtype, use_fast_accum=True)
        return y.unflatten(0, x.values.shape[:-1])
    return linear_plain(x, weight, bias)


def linear_plain(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    y = F.linear(x.values.float(), weight.values.float()) * x.scale * weight.scale.view(-1)
    return (y + bias.float()).to(bias.dtype)


def rms_rope_quantise(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Rows:
    """`wan.kernels.rms_rope`, then `quantise` of each head. x [B, S, dim], turns [S, D/2] → [B, S, H, D]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        return Rows(*triton_fp8.rms_rope_quantise(x, weight, eps, turns))
    return quantise_plain(rms_rope_plain(x.float(), weight.float(), eps, turns))


def write_keys(x: Tensor, weight: Tensor, eps: float, turns: Tensor, mean: Tensor, scale: Tensor, out: Tensor) -> None:
    """out ← (`wan.kernels.rms_rope` of x − mean)/scale, in e4m3. x [B, S, dim], mean [B, H, D], scale [B, H],
    out [B, S, H, D], which may be a slice of longer samples."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        triton_fp8.write_keys(x, weight, eps, turns, mean, scale, out)
    else:
        out.copy_(less_mean(rms_rope_plain(x.float(), weight.float(), eps, turns), mean, scale))


def less_mean(keys: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(keys − mean)/scale in e4m3. keys [B, S, H, D], mean [B, H, D], scale [B, H]."""
    return to_e4m3((keys.float() - mean[:, None]) / scale[:, None, :, None])


def write_values(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """out ← x/scale, in e4m3. x [B, S, H, D], scale [B, H], out [B, H, D, S], which may be a slice of longer rows."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        triton_fp8.write_values(x, scale, out)
    else:
        out.copy_(to_e4m3(x.float() / scale[:, None, :, None]).permute(0, 2, 3, 1))


def attention(q: Rows, held: Held, dtype: torch.dtype) -> Tensor:
    """softmax(q·kᵀ/√D)·v without a mask. q [B, Sq, H, D] → [B, Sq, H, D]. On a GPU D must be in HEAD_DIMS."""
    if q.values.is_cuda:
        from wan.kernels import triton_fp8_attention

        return triton_fp8_attention.attention(q.values, q.scale, *held, dtype)
    return attention_plain(q, held, dtype)


def attention_plain(q: Rows, held: Held, dtype: torch.dtype) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.values.float() * q.scale, held.keys.float())
    scores = scores * held.key_scale[:, :, None, None] / math.sqrt(q.values.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    products = torch.einsum("bhqk,bhdk->bhqd", to_e4m3(weights * LARGEST).float(), held.values.float())
    products = products * held.value_scale[:, :, None, None] / (weights.sum(-1, keepdim=True) * LARGEST)
    return products.transpose(1, 2).to(dtype)
