from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn


class WanVAE:
    """Wan's VAE over diffusers' AutoencoderKLWan, for normalised latents. Weights only: `stream()` makes the state."""

    def __init__(self, model: AutoencoderKLWan):
        self.model = model.eval().requires_grad_(False)

    @property
    def parameter(self) -> Tensor:
        return self.model.post_quant_conv.weight

    def to(self, device: torch.device) -> "WanVAE":
        """Moves the weights, and has convolutions computed as that device does fastest."""
        self.model.to(device)
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                _tune(module)
        return self

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and std of the latents, [16, 1, 1, 1]."""
        like = {"dtype": self.parameter.dtype, "device": self.parameter.device}
        config = self.model.config
        return (torch.tensor(config.latents_mean, **like).view(-1, 1, 1, 1),
                torch.tensor(config.latents_std, **like).view(-1, 1, 1, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Video [B, T, 3, H, W] in [-1, 1], T = 4F−3 → mean of the normalised latents [B, F, 16, h, w]."""
        mean, std = self._statistics()
        latents = self.model.encode(pixels.transpose(1, 2).to(mean.dtype)).latent_dist.mean
        return ((latents - mean) / std).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """All latents of a video at once, [B, F, 16, h, w] → [B, 4F−3, 3, H, W] in [-1, 1]."""
        mean, std = self._statistics()
        latents = latents.transpose(1, 2).to(mean.dtype) * std + mean
        return self.model.decode(latents).sample.transpose(1, 2)

    def stream(self) -> "WanStream":
        """The decoder state of a new video."""
        return WanStream(self)


def _tune(conv: nn.Conv2d | nn.Conv3d) -> None:
    """On a GPU: channels-last, as its tensor cores read. On a CPU: oneDNN for every 3-D convolution; PyTorch itself
    takes a loop of its own, ten times as slow, for those of few channels (`use_mkldnn` in ATen's Convolution.cpp)."""
    if conv.weight.is_cuda:
        vars(conv).pop("_conv_forward", None)
        conv.weight.data = _channels_last(conv.weight.data)
    elif isinstance(conv, nn.Conv3d) and conv.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        conv._conv_forward = MethodType(_onednn_forward, conv)


def _onednn_forward(conv: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class WanStream:
    """Decodes one video block by block; the same frames as `WanVAE.decode` gives for all its latents together.

    The cache of the causal convolutions lives here. `AutoencoderKLWan.decode` clears its own at entry and exit, so its
    decoder is called directly: `decoder(x, feat_cache, feat_idx, first_chunk)` is private to the pinned diffusers.
    """

    def __init__(self, vae: WanVAE):
        self.model = vae.model
        self.mean, self.std = vae._statistics()
        # WanDecoder3d keeps the last inputs of each of its causal convolutions in one slot of this list.
        self.features: list[Tensor | None] = [None] * self.model._cached_conv_counts["decoder"]
        self.started = False

    def __call__(self, latents: Tensor) -> Tensor:
        """The video's next latents [B, F, 16, h, w] → their frames [B, T, 3, H, W] in [-1, 1]; T = 4F, or 4F−3 at
        the start of the video."""
        latents = latents.transpose(1, 2).to(self.mean.dtype) * self.std + self.mean
        if latents.is_cuda:
            latents = _channels_last(latents)
        frames = []
        for latent in self.model.post_quant_conv(latents).split(1, dim=2):
            first, self.started = not self.started, True
            frames.append(self.model.decoder(latent, feat_cache=self.features, feat_idx=[0], first_chunk=first))
        return torch.cat(frames, 2).clamp(-1, 1).transpose(1, 2)
