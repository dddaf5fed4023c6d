from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.kernels import HAS_TRITON, fused
from wan.kernels.hopper import HEADS, agrees, is_hopper, numbers

# PyTorch's, fastest first on the cards measured: at 4680×18720 tokens on an H200 cuDNN takes 0.99 ms, flash 1.7 ms.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

FEWEST_KEYS = 2048  # for which our own kernel comes first, where it can: 0.82 ms at 4680×18720 on that H200


def fastest(device: torch.device) -> AbstractContextManager:
    """While it lasts, `attention` takes the first of BACKENDS that supports its inputs."""
    return sdpa_kernel(BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v without a mask. q [B, Sq, H, D], k and v [B, Sk, H, D] → [B, Sq, H, D]."""
    if _are_ours(q, k, v):
        from wan.kernels import gluon_attention  # not before: Triton needs a GPU driver

        return gluon_attention.attention(q, k, v)
    return pytorchs(q, k, v)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` of a single head, without an axis for it. q [N, Sq, C], k and v [N, Sk, C] → [N, Sq, C]."""
    if fused(q, k, v) and _is_wide(q.device, q.dtype, q.shape[-1]):
        from wan.kernels import triton_wide_attention  # not before: Triton needs a GPU driver

        return triton_wide_attention.attention(q, k, v)
    return pytorchs(*(x[:, :, None] for x in (q, k, v)))[:, :, 0]


def pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by PyTorch's."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _are_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether our own kernel takes these: no gradient is wanted, and keys and values lie as the GPU's copies of tiles
    want them. Their strides may be those of more keys than there are, and of heads that others lie between."""
    return len(q) == 1 and _can_be_ours(q.device, q.dtype, q.shape[3]) and k.shape[1] >= FEWEST_KEYS \
        and fused(q, k, v) and k.dtype == v.dtype == q.dtype and all(
            x.stride(3) == 1 and x.data_ptr() % 16 == x.stride(1) % 8 == x.stride(2) % 8 == 0 for x in (q, k, v))


@cache
def _can_be_ours(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether our own kernel is for this GPU and such numbers, and Triton has the Gluon that it is written in."""
    def once() -> tuple[Tensor, Tensor]:
        from wan.kernels import gluon_attention

        q, k, v = (numbers(1, count, HEADS, head_dim, device=device).to(dtype) for count in (200, 300, 300))
        return gluon_attention.attention(q, k, v), pytorchs(q, k, v)

    return HAS_TRITON and is_hopper(device) and head_dim == 128 and dtype in (torch.bfloat16, torch.float16) \
        and agrees(once, "Attention is PyTorch's")


@cache
def _is_wide(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether it is as wide as our own kernel, which needs the memory that a processor of Hopper has."""
    return is_hopper(device) and channels == 384 and dtype in (torch.bfloat16, torch.float16)


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """By what attention to many keys is computed on this device, in words for people: one of BACKENDS or our own."""
    if _can_be_ours(device, dtype, head_dim):
        return "gluon attention"
    q = torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype)
    with fastest(device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace("_", " ")
