"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are made about one."""

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices, and for convolutions as matrices of filters. A step's size is that of AdamW at the same lr (Liu
    et al. 2025, arXiv:2502.16982). lr may be a tensor, so that a step can be recorded as a CUDA graph.

    Matrices of one shape go through the products together: hundreds of small kernels would take longer than all else.
    """

    def __init__(self, parameters, lr: float | Tensor, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for value in group["params"]:
                if value.grad is not None:
                    shapes[value.shape].append(value)
            for values in shapes.values():
                self._step(values, group["lr"], group["momentum"])

    def _step(self, values: list[Tensor], lr: float | Tensor, momentum: float) -> None:
        gradients = [value.grad for value in values]
        for value in values:
            if not self.state[value]:
                self.state[value]["mean"] = torch.zeros_like(value)
        means = [self.state[value]["mean"] for value in values]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, means, momentum)).flatten(2)
        change = orthogonal(ahead) * (lr * 0.2 * max(ahead.shape[1:]) ** 0.5)
        torch._foreach_sub_(values, list(change.view(-1, *values[0].shape).unbind()))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ of [..., rows, columns], by five Newton-Schulz steps; the coefficients are
    Jordan's. On a GPU in bfloat16, as he does it."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return (x.mT if tall else x).to(matrices.dtype)
