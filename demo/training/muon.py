"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are made about one."""

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices, and for convolutions as matrices of filters. A step's size is that of AdamW at the same lr (Liu
    et al. 2025, arXiv:2502.16982). lr may be a tensor, so that a step can be recorded as a CUDA graph.
    """

    def __init__(self, parameters, lr: float | Tensor, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                state = self.state[value]
                if not state:
                    state["mean"] = torch.zeros_like(value)
                state["mean"].lerp_(value.grad, 1 - group["momentum"])
                ahead = value.grad.lerp(state["mean"], group["momentum"]).flatten(1)
                size = 0.2 * max(ahead.shape) ** 0.5
                value.sub_(orthogonal(ahead).view_as(value) * (group["lr"] * size))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ, by five Newton-Schulz steps; the coefficients are Jordan's."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x.T if tall else x
