"""A LoRA in training: a low-rank matrix on every Linear of the generator's blocks."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wan.model import CausalWan

RANK = 16


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): a weight plus B·A, alpha = rank."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def add_lora(model: CausalWan, rank: int) -> nn.ModuleDict:
    """Puts a LoRA on every Linear of the blocks, freezes all else. Returns them, by names with / for dots."""
    model.requires_grad_(False)
    added = nn.ModuleDict()
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            added[name.replace(".", "/")] = low = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", low)
    return added
