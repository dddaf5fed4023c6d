from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan import waves
from wan.kernels import HAS_TRITON, fused

# Fastest first on the cards measured: at 4680×18720 tokens on an H200 cuDNN takes 1.0 ms, flash 1.7 ms.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

TILE = 128  # queries of a tile of cuDNN's
CUDNN = SDPBackend.CUDNN_ATTENTION.name.lower().replace("_", " ")
OURS = False  # whether our own kernel comes before all of them where it can, on Hopper
FEWEST_KEYS = 2048  # for which it does; a prompt has fewer


def fastest(device: torch.device) -> AbstractContextManager:
    """While it lasts, `attention` takes the first of BACKENDS that supports its inputs."""
    return sdpa_kernel(BACKENDS, set_priority=True) if device.type == "cuda" else nullcontext()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v without a mask. q [B, Sq, H, D], k and v [B, Sk, H, D] → [B, Sq, H, D]."""
    if _are_ours(q, k, v):
        from wan.kernels import gluon_attention  # not before: Triton needs a GPU driver

        return gluon_attention.attention(q, k, v)
    if len(q) == 1 and _in_waves(q.device, q.dtype, q.shape[-1]) and not (torch.is_grad_enabled() and q.requires_grad):
        first, parts = waves.shares(q.shape[1], k.shape[1], q.shape[2], TILE, waves.at_once(q.device, 1))
        if parts > 1:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            out[:, :first] = in_one_go(q[:, :first], k, v)
            _to_parts(q[:, first:], k, v, parts, out[:, first:])
            return out
    return in_one_go(q, k, v)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` of a single head, without an axis for it. q [N, Sq, C], k and v [N, Sk, C] → [N, Sq, C]."""
    if fused(q, k, v) and _is_wide(q.device, q.dtype, q.shape[-1]):
        from wan.kernels import triton_wide_attention  # not before: Triton needs a GPU driver

        return triton_wide_attention.attention(q, k, v)
    return in_one_go(*(x[:, :, None] for x in (q, k, v)))[:, :, 0]


def in_one_go(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by one call of PyTorch's."""
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
    if not OURS or not HAS_TRITON or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9 \
            or head_dim != 128 or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        from wan.kernels import gluon_attention  # noqa: F401
    except (ImportError, AttributeError):  # it has no promise to stay as it is
        return False
    return True


@cache
def _in_waves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it is cuDNN's attention as it is on Hopper, with one tile of TILE queries on a processor at a time."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and head_dim == 128 \
        and dtype in (torch.bfloat16, torch.float16) and _pytorchs(device, dtype, head_dim) == CUDNN


@cache
def _is_wide(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether it is as wide as our own kernel, which needs the memory that a processor of Hopper has."""
    return torch.cuda.get_device_capability(device)[0] == 9 and channels == 384 \
        and dtype in (torch.bfloat16, torch.float16)


def _to_parts(q: Tensor, k: Tensor, v: Tensor, parts: int, out: Tensor) -> None:
    """out ← cuDNN's attention to `parts` parts of the keys at the same time, added up."""
    k, v = (x.reshape(parts, -1, *x.shape[2:]) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (waves.several(q, parts), k, v))
    some, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    waves.add_up(some.transpose(1, 2), sums.view(*some.shape[:-1], 1).transpose(1, 2), out)


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """By what attention to many keys is computed on this device, in words for people: one of BACKENDS or our own."""
    return "gluon attention" if _can_be_ours(device, dtype, head_dim) else _pytorchs(device, dtype, head_dim)


def _pytorchs(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which of BACKENDS PyTorch takes."""
    q = torch.empty(1, 1, 128, head_dim, device=device, dtype=dtype)
    with fastest(device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace("_", " ")
