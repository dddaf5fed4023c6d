from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Fastest first on the cards measured: at 4680×18720 tokens on an H200 cuDNN takes 1.0 ms, flash 1.7 ms.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fastest(device: torch.device) -> AbstractContextManager:
    """While it lasts, `attention` takes the first of BACKENDS that supports its inputs."""
    return sdpa_kernel(BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v without a mask. q [B, Sq, H, D], k and v [B, Sk, H, D] → [B, Sq, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which of BACKENDS it is on this device, in words for people."""
    q = torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype)
    with fastest(device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace("_", " ")
