"""Fused kernels: each function is the plain PyTorch version, and hands over to Triton where the data is on a GPU."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-24  # only keeps zeros from dividing by zero

HAS_TRITON = importlib.util.find_spec("triton") is not None


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out ← SiLU(RMSNorm(x + bias)·gamma), over the last axis; inside in float32.

    x and out [..., C], contiguous; gamma and bias [C].
    """
    if x.is_cuda and HAS_TRITON:
        from wan.kernels import triton_vae  # not before: Triton needs a GPU driver

        triton_vae.norm_silu(x, gamma, bias, out)
    else:
        out.copy_(norm_silu_plain(x, gamma, bias))


def norm_silu_plain(x: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    x = x.float() if bias is None else x.float() + bias.float()
    return F.silu(F.rms_norm(x, x.shape[-1:], gamma.float(), EPS))


def add_bias(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """x + bias + skip, x overwritten. x and skip [..., C], contiguous; bias [C]."""
    if x.is_cuda and HAS_TRITON:
        from wan.kernels import triton_vae

        return triton_vae.add_bias(x, bias, skip)
    return add_bias_plain(x, bias, skip)


def add_bias_plain(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return (x.float() + bias.float() + skip.float()).to(x.dtype)


def is_fast(x: Tensor) -> bool:
    """Whether PyTorch's own 3-D convolution is the fast one for x: not on a CPU with oneDNN, where it takes a loop of
    its own, ten times as slow, for few channels (`use_mkldnn` in ATen's Convolution.cpp)."""
    return x.is_cuda or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available()


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of x [B, T, H, W, C] with weight [C', C, kt, kh, kw] → [B, T−kt+1, H, W, C']; rows and columns are
    padded with zeros, frames are not."""
    kh, kw = weight.shape[-2:]
    x, padding = x.permute(0, 4, 1, 2, 3), [0, kh // 2, kw // 2]
    if is_fast(x):
        y = F.conv3d(x, weight, bias, padding=padding)
    else:
        y = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
    return y.permute(0, 2, 3, 4, 1)
