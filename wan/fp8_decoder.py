"""The decoder of Wan's VAE with 8 bits, where that is faster: in the convolutions of its residual blocks, which are
most of its arithmetic. What goes into them is SiLU(norm(x)), of a size that is known. That goes into the very last
convolution, too, but there it would cost the most in quality; no other convolution follows a norm."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from wan.causal_conv import CausalConv3d
from wan.kernels.fp8_conv import (
    Filters,
    conv3d_e4m3,
    conv3d_e4m3_plain,
    filters_of,
    norm_silu_e4m3,
    norm_silu_e4m3_plain,
    room,
    steps_for,
)
from wan.kernels.hopper import agrees, is_hopper, numbers
from wan.vae import WanVAE
from wan.vae_decoder import Norm, Residual

# Channels, and those of the result, of the convolutions that are faster so on Hopper. Measured by
# scripts/tune_decoder.py.
HOPPER = {(96, 96), (192, 192), (192, 384), (384, 384)}


class Fp8CausalConv3d(nn.Module):
    """A CausalConv3d of 3×3×3 after a norm, with the same verbs. Its frames are those of `wan.kernels.fp8_conv`."""

    def __init__(self, full: CausalConv3d, norm: Norm):
        super().__init__()
        self.in_channels, self.out_channels, self.bias = full.in_channels, full.out_channels, full.bias
        self.steps = steps_for(norm.gamma)
        filters = filters_of(full.weight.detach(), self.steps)
        self.register_buffer("values", filters.values)
        self.register_buffer("scale", filters.scale)

    def room(self, x: Tensor, frames: int) -> Tensor:
        return room(x, frames)

    def write(self, x: Tensor, norm: Norm, bias: Tensor | None, out: Tensor) -> None:
        norm_silu_e4m3(x, norm.gamma.flatten(), bias, self.steps, out)

    def reads_rings(self, x: Tensor) -> bool:
        return True

    def forward(self, frames: Tensor, bias: Tensor | None, skip: Tensor | None = None) -> Tensor:
        return self.of_ring(frames, 0, frames.shape[1], bias, skip)

    def of_ring(self, ring: Tensor, start: int, frames: int, bias: Tensor | None, skip: Tensor | None) -> Tensor:
        return conv3d_e4m3(ring, start, frames, Filters(self.values, self.scale), bias, skip, self.bias.dtype)


def is_faster(conv: CausalConv3d, device: torch.device) -> bool:
    """Whether `conv` is to be done with 8 bits on this device."""
    return (conv.in_channels, conv.out_channels) in HOPPER and _is_able(device)


@cache
def _is_able(device: torch.device) -> bool:
    """Whether it is a GPU of Hopper's kind, and Triton has what the kernels need."""
    return is_hopper(device) and agrees(partial(convolve_once, device), "The decoder stays in full precision")


@torch.inference_mode()
def convolve_once(device: torch.device) -> tuple[Tensor, Tensor]:
    """A small convolution, of channels that Wan's decoder has, and the same by the plain versions."""
    x, weight = numbers(1, 3, 5, 7, 96, device=device).bfloat16(), numbers(96, 96, 3, 3, 3, device=device).bfloat16()
    gamma = torch.ones(96, dtype=torch.bfloat16, device=device)
    steps = steps_for(gamma)
    filters, frames, plain_frames = filters_of(weight, steps), room(x, 3), room(x, 3)
    norm_silu_e4m3(x, gamma, None, steps, frames)
    norm_silu_e4m3_plain(x, gamma, None, steps, plain_frames)
    return (conv3d_e4m3(frames, 0, 3, filters, None, None, torch.bfloat16),
            conv3d_e4m3_plain(plain_frames, 0, 3, filters, None, None, torch.bfloat16))


def to_fp8(vae: WanVAE, device: torch.device,
           wanted: Callable[[CausalConv3d, torch.device], bool] = is_faster) -> WanVAE:
    """`vae` itself, with 8 bits in the convolutions that are `wanted`; those are then on `device`. On a CPU they are
    computed by the plain versions, which are slow: a reference for what a GPU computes."""
    for block in vae.model.modules():
        if isinstance(block, Residual):
            for conv, norm in (("conv1", block.norm1), ("conv2", block.norm2)):
                full = getattr(block, conv)
                if wanted(full, device):
                    setattr(block, conv, Fp8CausalConv3d(full.to(device), norm.to(device)))
    return vae
