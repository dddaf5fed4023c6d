"""Fused operations. Each has its plain PyTorch version here. Where no gradient is wanted it hands over to a Triton
kernel for data on a GPU and, where that is faster, to `wan.kernels.cpu` for float32 on a CPU. Inside, all compute in
float32."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.kernels import cpu
from wan.rope import rotate

EPS = 1e-24  # only keeps zeros from dividing by zero

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _no_gradient(inputs: tuple[Tensor, ...]) -> bool:
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))


def fused(*inputs: Tensor) -> bool:
    """Whether Triton kernels take these."""
    return inputs[0].is_cuda and HAS_TRITON and _no_gradient(inputs)


def _on_cpu(*inputs: Tensor) -> bool:
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs) and _no_gradient(inputs)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then x·(1+scale)+shift. x [B, F, L, dim], shift and scale [B, F, 1, dim]."""
    if fused(x, shift, scale):
        from wan.kernels import triton_wan  # not before: Triton needs a GPU driver

        return triton_wan.modulate(x, shift, scale, eps)
    return modulate_plain(x, shift, scale, eps)


def modulate_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y. x and y [B, F, L, dim], gate [B, F, 1, dim]."""
    if fused(x, gate, y):
        from wan.kernels import triton_wan

        return triton_wan.gated(x, gate, y)
    return gated_plain(x, gate, y)


def gated_plain(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x, gate, y)


def gated_norm(x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + gate·y, and the LayerNorm of that. x and y [B, F, L, dim], gate [B, F, 1, dim], weight and bias [dim]."""
    if fused(x, gate, y, weight):
        from wan.kernels import triton_wan

        return triton_wan.sum_norm(x, gate, y, bias, weight, eps)
    return gated_norm_plain(x, gate, y, weight, bias, eps)


def gated_norm_plain(x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, bias: Tensor,
                     eps: float) -> tuple[Tensor, Tensor]:
    x = gated_plain(x, gate, y)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_modulate(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and `modulate` of that. x and y [B, F, L, dim], shift and scale [B, F, 1, dim]."""
    if fused(x, y, shift, scale):
        from wan.kernels import triton_wan

        return triton_wan.sum_norm(x, None, y, shift, scale, eps)
    return add_modulate_plain(x, y, shift, scale, eps)


def add_modulate_plain(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, modulate_plain(x, shift, scale, eps)


def rms_rope(x: Tensor, weight: Tensor, eps: float, turns: Tensor, out: Tensor | None = None) -> Tensor:
    """RMSNorm over the whole dim, then RoPE of each head. x [B, S, dim], turns [S, D/2] → [B, S, H, D].

    out: where a kernel is to write the result, for one copy less. A plain version makes a tensor of its own.
    """
    if fused(x, weight):
        from wan.kernels import triton_wan

        return triton_wan.rms_rope(x, weight, eps, turns, out)
    return rms_rope_plain(x, weight, eps, turns)


def rms_rope_both(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, turns: Tensor,
                  out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_rope` of q, and of k; out: for that of k."""
    if fused(q, k, q_weight, k_weight):
        from wan.kernels import triton_wan

        return triton_wan.rms_rope_both(q, k, q_weight, k_weight, eps, turns, out)
    return rms_rope_plain(q, q_weight, eps, turns), rms_rope_plain(k, k_weight, eps, turns)


def rms_rope_plain(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    return rotate(F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (-1, 2 * turns.shape[-1])), turns)


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [C', C], out [..., C'] → [..., C'], in `out` where cuBLAS can write there
    with the bias added: on a GPU, where it is one piece of memory."""
    if fused(x, weight, bias) and out.is_contiguous() and x.dtype == weight.dtype == out.dtype:
        torch.addmm(bias, x.flatten(0, -2), weight.t(), out=out.flatten(0, -2))
        return out
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x·weightᵀ + bias), by tanh. x [..., C], weight [C', C] → [..., C']."""
    if fused(x, weight, bias):  # cuBLAS applies it before it writes the product
        return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])
    if _on_cpu(x, weight, bias):
        return cpu.linear_gelu(x, weight, bias)
    return linear_gelu_plain(x, weight, bias)


def linear_gelu_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out ← SiLU(RMSNorm(x + bias)·gamma), over the last axis; inside in float32.

    x and out [..., W, C], contiguous; x may be overwritten where there is a bias; gamma and bias [C].
    """
    if fused(x, gamma):
        from wan.kernels import triton_vae

        triton_vae.norm_silu(x, gamma, bias, out)
    elif _on_cpu(x, gamma):
        cpu.norm_silu(x, gamma, bias, EPS, out)
    else:
        out.copy_(norm_silu_plain(x, gamma, bias))


def norm_silu_plain(x: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    x = x.float() if bias is None else x.float() + bias.float()
    return F.silu(F.rms_norm(x, x.shape[-1:], gamma.float(), EPS))


def add_bias(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """x + bias + skip, x overwritten. x and skip [..., W, C], contiguous; bias [C]."""
    if fused(x, bias, skip):
        from wan.kernels import triton_vae

        return triton_vae.add_bias(x, bias, skip)
    if _on_cpu(x, bias, skip):
        return cpu.add_bias(x, bias, skip)
    return add_bias_plain(x, bias, skip)


def add_bias_plain(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return (x.float() + bias.float() + skip.float()).to(x.dtype)


def twice(x: Tensor) -> Tensor:
    """Every row and column twice. x [N, H, W, C], contiguous → [N, 2H, 2W, C]."""
    if fused(x):
        from wan.kernels import triton_vae

        return triton_vae.twice(x)
    return twice_plain(x)


def twice_plain(x: Tensor) -> Tensor:
    n, height, width, channels = x.shape
    return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).reshape(n, 2 * height, 2 * width, channels)


def conv2d_of_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of `twice(x)`, padded with zeros. x [N, H, W, C], contiguous; weight [C', C, 3, 3], bias [C']
    → [N, 2H, 2W, C']."""
    if fused(x, weight, bias):
        from wan.kernels import triton_vae

        return triton_vae.interleave(folded_conv2d(x, weight), bias)
    if _on_cpu(x, weight, bias):
        return cpu.interleave(folded_conv2d(x, weight), bias)
    return conv2d_of_twice_plain(x, weight, bias)


def folded_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """The products of `conv2d_of_twice`. Of the three rows of `twice(x)` that a kernel covers two are the same row of
    x, and likewise columns. So 4 products take the place of 9: a kernel 2 wide on x for each of the four pixels that a
    pixel becomes, and the large frame is never stored. (A transposed convolution does it too, but oneDNN's depends on
    the number of threads.)

    x [N, H, W, C], weight [C', C, 3, 3] → [N, H+1, W+1, 4·C']: pixel (2i+a, 2j+b) of the result is the part 2a+b of
    entry (i+a, j+b).
    """
    kernels = _fold(_fold(weight.float(), -2), -1).transpose(0, 1).flatten(0, 2).to(weight.dtype)
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), kernels, padding=1).permute(0, 2, 3, 1)


def _fold(weight: Tensor, axis: int) -> Tensor:
    """[..., 3, ...] → [2, ..., 2, ...]: what the even and the odd pixels see of an axis."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)])


def conv2d_of_twice_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(twice(x).permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
