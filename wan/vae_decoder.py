"""The weights of Wan's VAE that make frames of latents, under the names that diffusers' AutoencoderKLWan has for them.

Its own module is not used: importing diffusers takes longer than making the first frames of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wan.causal_conv import CausalConv3d


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE in AutoencoderKLWan's words; the defaults are those of Wan 2.1."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # base_dim where None
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: Sequence[bool] = (False, True, True)
    latents_mean: Sequence[float] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                                     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    latents_std: Sequence[float] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
    out_channels: int = 3
    patch_size: int | None = None  # pixels, each way, that one position of the last map becomes


class VAEDecoder(nn.Module):
    """Weights only: `wan.vae.WanStream` computes with them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        widths = [base * factor for factor in reversed(config.dim_mult)]
        inputs = [widths[0], *(width // 2 for width in widths[:-1])]  # an upsampler halves the channels
        in_time = [*reversed(config.temperal_downsample)]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], 3)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip(inputs, widths, strict=True)):
            upsampler = None if i == len(widths) - 1 else Upsampler(width, in_time[i])
            self.up_blocks.append(Up(before, width, config.num_res_blocks + 1, upsampler))
        self.norm_out = Norm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, 3)


class Norm(nn.Module):
    def __init__(self, channels: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs, 3), CausalConv3d(inputs, outputs, 3)
        self.norm2, self.conv2 = Norm(outputs, 3), CausalConv3d(outputs, outputs, 3)
        self.conv_shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([Residual(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels)])


class Upsampler(nn.Module):
    """Twice the rows and columns of frames with half the channels; twice the frames too where `in_time`."""

    def __init__(self, channels: int, in_time: bool):
        super().__init__()
        self.mode = "upsample3d" if in_time else "upsample2d"
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3))
        if in_time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int, upsampler: Upsampler | None):
        super().__init__()
        self.resnets = nn.ModuleList([Residual(outputs if i else inputs, outputs) for i in range(count)])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])
