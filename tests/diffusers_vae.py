"""Wan's VAE as diffusers has it, the plain version of `wan.vae`: all of a video at once, and the encoder too."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan.sizes import from_sizes
from wan.vae import WanStream, WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder


def empty(sizes: dict[str, Any]) -> AutoencoderKLWan:
    """On the meta device. sizes: in its own words."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(sizes)


class DiffusersVAE(WanVAE):
    """Over an AutoencoderKLWan, whose decoder has the weights that `stream()` needs under the same names."""

    def stream(self) -> WanStream:
        with torch.device("meta"):
            model = VAEDecoder(from_sizes(VAEConfig, dict(self.model.config)))
        weights = self.model.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
        return WanVAE(model).to(self.parameter.device).stream()

    def encode(self, pixels: Tensor) -> Tensor:
        """Video [B, T, 3, H, W] in [-1, 1], T = 4F−3 → mean of the normalised latents [B, F, 16, h, w]."""
        mean, std = (x[:, None, None] for x in self._statistics())
        latents = self.model.encode(pixels.transpose(1, 2).to(mean.dtype)).latent_dist.mean
        return (latents.transpose(1, 2) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """All latents of a video at once by diffusers' own decoder, the plain version of `WanStream`.

        [B, F, 16, h, w] → [B, 4F−3, 3, H, W] in [-1, 1].
        """
        mean, std = (x[:, None, None] for x in self._statistics())
        latents = latents.to(mean.dtype) * std + mean
        return self.model.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
