"""Sizes of whole models, and random values for their weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wan.model import WanConfig


@dataclass(frozen=True)
class Sizes:
    generator: WanConfig
    vae: dict
    text: dict
    lora_rank: int
    text_dtype: torch.dtype


SIZES = {
    "toy": Sizes(
        WanConfig(dim=256, ffn_dim=768, freq_dim=64, text_dim=128, num_heads=4, num_layers=6, text_len=64),
        # Two pixels by two are one position of the VAE's largest maps: a quarter of the work.
        {"base_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [True, True],
         "patch_size": 2, "in_channels": 12, "out_channels": 12},
        {"vocab_size": 1024, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4},
        lora_rank=16, text_dtype=torch.float32,
    ),
    "full": Sizes(
        WanConfig(), {}, {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
                          "num_heads": 64},
        lora_rank=256, text_dtype=torch.bfloat16,
    ),
}


def randomise(model: nn.Module, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random values, on the CPU, for a model made on the meta device, drawn one tensor after the other on `device`."""
    return {name: value.cpu() for name, value in draw(model, device, generator)}


def draw(model: nn.Module, device: str, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Name and random value of each tensor of a model made on the meta device: matrices keep the size of what goes
    through them, norms are one, biases small."""
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, device=device, generator=generator)
        if "norm" in name and name.endswith(("weight", "gamma")):
            value = torch.ones_like(value)
        elif tensor.dim() > 1 and "modulation" not in name and "relative" not in name:
            value *= tensor[0].numel() ** -0.5
        else:
            value *= 0.1
        yield name, value
