"""What the transformer does with 8 bits. On a GPU these are Triton kernels; the plain versions beside them round in the
same places and compute in float32.

Linear layers and queries·keys are products of int8 rows, each with a scale of its own: where values are spread like a
normal distribution, its steps are a third of e4m3's. Values, and the weights of the softmax, are e4m3, for what is
summed there spans more magnitudes than int8 has, and a channel's values can't have a scale for each token.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.kernels import modulate_plain, rms_rope_plain
from wan.kernels.hopper import HEADS, agrees, is_hopper, numbers

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448; beyond it a cast gives NaN
STEPS = 127  # of int8, from zero to the largest value of a row
HEAD_DIMS = (64, 128)  # of `attention` on a GPU
LEAST = 1e-12  # of what a scale is made of, so that a row of zeros has one


class Rows(NamedTuple):
    """x [..., C] as values·scale: int8 [..., C] and float32 [..., 1]. What is no number makes the scale none."""

    values: Tensor
    scale: Tensor


class Held(NamedTuple):
    """The keys and values to attend to. Keys are keys·key_scale, but for a vector that all keys of a head lack;
    values are values·value_scale, each channel's in one piece, as the tensor cores want them."""

    keys: Tensor  # int8 [B, S, H, D]
    values: Tensor  # e4m3 [B, H, D, S]
    key_scale: Tensor  # float32 [B, H, S]
    value_scale: Tensor  # float32 [B, H]
    run: int = 1  # of the keys of a head, how many from each multiple of it share a scale


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded; where x is too large for the format, its largest value."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def scale_of(x: Tensor, dims: tuple[int, ...] | int, headroom: float = 1.0) -> Tensor:
    """What x is to be divided by for its largest value along `dims`, kept with size 1, to be e4m3's 448/headroom. As
    e4m3 is a floating-point format, a value that is neither above 448 nor below 2^-6 is rounded by up to 1/16 of its
    size, whatever the scale: it need not be tight, only safe."""
    return x.abs().amax(dims, keepdim=True).float().clamp_min(LEAST) * (headroom / LARGEST)


def smoothing(weight: Tensor) -> Tensor:
    """s, float32 [C], for (x·s)·(weight/s)ᵀ in place of x·weightᵀ; weight [C', C].

    s is how large the columns are, as roots of mean squares, with each row taken as of the same size. Divided by it, no
    column is lost beside a larger one; multiplied by it, a channel of x is as large as its part in the product, and
    one that is large because its weights are small leaves more steps to the others. This is SmoothQuant (Xiao et al.
    2023, arXiv:2211.10438) from the weights alone, without data."""
    squares = weight.float().square()
    sizes = (squares / squares.mean(1, keepdim=True).clamp_min(LEAST**2)).mean(0).sqrt()
    return sizes.clamp_min(1e-2)  # not 0, for a column of zeros; in all, the mean of squares is 1


def quantise(x: Tensor, smooth: Tensor | None = None) -> Rows:
    """x [..., C], or x·smooth, each row with a scale of its own. smooth float32 [C]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8  # not before: Triton needs a GPU driver

        return Rows(*triton_fp8.quantise(x, smooth, gelu=False))
    return quantise_plain(x, smooth)


def quantise_plain(x: Tensor, smooth: Tensor | None = None) -> Rows:
    x = x.float() if smooth is None else x.float() * smooth
    scale = x.abs().amax(-1, keepdim=True).clamp_min(LEAST) / STEPS
    return Rows((x / scale).round().to(torch.int8), scale)


def gelu_quantise(x: Tensor, smooth: Tensor) -> Rows:
    """GELU by tanh, then `quantise`. x [..., C]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        return Rows(*triton_fp8.quantise(x, smooth, gelu=True))
    return gelu_quantise_plain(x, smooth)


def gelu_quantise_plain(x: Tensor, smooth: Tensor) -> Rows:
    return quantise_plain(F.gelu(x.float(), approximate="tanh"), smooth)


def add_modulate_quantise(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float,
                          smooth: Tensor) -> tuple[Tensor, Rows]:
    """x + y, and `modulate_quantise` of that. y as x."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        x, *rows = triton_fp8.modulate_quantise(x, shift, scale, eps, smooth, y)
        return x, Rows(*rows)
    return add_modulate_quantise_plain(x, y, shift, scale, eps, smooth)


def add_modulate_quantise_plain(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float,
                                smooth: Tensor) -> tuple[Tensor, Rows]:
    return x + y, modulate_quantise_plain(x + y, shift, scale, eps, smooth)


def modulate_quantise(x: Tensor, shift: Tensor, scale: Tensor, eps: float, smooth: Tensor) -> Rows:
    """`wan.kernels.modulate`, then `quantise`. x [B, F, L, dim], shift and scale [B, F, 1, dim] → [B, F·L, dim]."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        _, *rows = triton_fp8.modulate_quantise(x, shift, scale, eps, smooth)
        return Rows(*rows)
    return modulate_quantise_plain(x, shift, scale, eps, smooth)


def modulate_quantise_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float, smooth: Tensor) -> Rows:
    return quantise_plain(modulate_plain(x.float(), shift.float(), scale.float(), eps).flatten(1, 2), smooth)


def linear(x: Rows, weight: Rows, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [C', C], bias [C'] → [..., C'] in the dtype of the bias. On a GPU C must be
    a multiple of 16."""
    if x.values.is_cuda:
        from wan.kernels import triton_int8_linear

        return triton_int8_linear.linear(*x, *weight, bias)
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


def write_keys(x: Tensor, weight: Tensor, eps: float, turns: Tensor, mean: Tensor, out: Tensor, scale: Tensor,
               run: int = 1) -> None:
    """out, scale ← `wan.kernels.rms_rope` of x, − mean, quantised: each head with a scale of its own for every `run`
    tokens. x [B, S, dim], mean [B, H, D], out int8 [B, S, H, D] and scale [B, H, S], which may be slices of longer
    samples and rows; `run` divides S."""
    if x.is_cuda:
        from wan.kernels import triton_fp8

        triton_fp8.write_keys(x, weight, eps, turns, mean, out, scale, run)
    else:
        write_less_mean(rms_rope_plain(x.float(), weight.float(), eps, turns), mean, out, scale, run)


def write_less_mean(keys: Tensor, mean: Tensor, out: Tensor, scale: Tensor, run: int = 1) -> None:
    """out, scale ← keys − mean, quantised. keys [B, S, H, D]; as `write_keys`."""
    keys = keys.float() - mean[:, None]
    share_scales(keys.abs().amax(-1).transpose(1, 2), run, scale)
    out.copy_((keys / scale.transpose(1, 2)[..., None]).round())


def share_scales(largest: Tensor, run: int, scale: Tensor) -> None:
    """scale ← what int8 keys are multiplied by, of the size of the largest number of each, both [B, H, S]."""
    shared = largest.unflatten(-1, (-1, run)).amax(-1, keepdim=True).clamp_min(LEAST) / STEPS
    scale.unflatten(-1, (-1, run)).copy_(shared)


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
        return _attention_kernel(q.values, held.run)(q.values, q.scale, *held, dtype)
    return attention_plain(q, held, dtype)


def _attention_kernel(q: Tensor, run: int) -> Callable[..., Tensor]:
    """The fastest for these queries on their GPU."""
    from wan.kernels import triton_fp8_attention

    if q.shape[0] == 1 and q.shape[3] == 128 and is_hopper(q.device) and _has_gluon(q.device):
        from wan.kernels import gluon_fp8_attention

        if run >= gluon_fp8_attention.KEYS.value:
            return gluon_fp8_attention.attention
    return triton_fp8_attention.attention


@cache
def _has_gluon(device: torch.device) -> bool:
    """Whether Triton has the Gluon that Hopper's own kernel is written in."""
    def once() -> tuple[Tensor, Tensor]:
        from wan.kernels import gluon_fp8_attention

        q, k = (quantise_plain(numbers(1, count, HEADS, 128, device=device)) for count in (200, 256))
        values = to_e4m3(numbers(1, 256, HEADS, 128, device=device).permute(0, 2, 3, 1).contiguous())
        scale = k.scale[..., 0].amax(1)[..., None].expand(1, HEADS, 256).clone()
        held = Held(k.values, values, scale, torch.ones(1, HEADS, device=device), 256)
        got = gluon_fp8_attention.attention(q.values, q.scale, *held, torch.bfloat16)
        return got, attention_plain(q, held, torch.float32)

    return agrees(once, "Attention is by the kernel for all GPUs")


def attention_plain(q: Rows, held: Held, dtype: torch.dtype) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q.values.float() * q.scale, held.keys.float())
    scores = scores * held.key_scale[:, :, None] / math.sqrt(q.values.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    products = torch.einsum("bhqk,bhdk->bhqd", to_e4m3(weights * LARGEST).float(), held.values.float())
    products = products * held.value_scale[:, :, None, None] / (weights.sum(-1, keepdim=True) * LARGEST)
    return products.transpose(1, 2).to(dtype)
