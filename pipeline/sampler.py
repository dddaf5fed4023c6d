"""Few-step flow-matching sampler: x_t = (1−σ)·x0 + σ·noise, the network predicts the flow v, x0 = x_t − σ·v."""

from collections.abc import Callable, Sequence

from torch import Tensor

TABLE = 1000  # entries of the training schedule, t in [0, 1000]


def shifted_sigma(s: float, shift: float) -> float:
    """σ = shift·s/(1+(shift−1)·s): the share of noise after the schedule is shifted towards noise.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    return shift * s / (1 + (shift - 1) * s)


def timesteps(steps: Sequence[int], shift: float, warp: bool) -> list[float]:
    """Timesteps t in (0, 1000] of a `denoising_step_list`; σ = t/1000.

    warp: the list indexes the shifted table from its end (1000 → σ = 1); otherwise the list is t itself.
    """
    if not warp:
        return [float(step) for step in steps]
    return [TABLE * shifted_sigma(step / TABLE, shift) for step in steps]


def denoise_block(flow: Callable[[Tensor, float], Tensor], noise: Tensor, steps: Sequence[float],
                  renoise: Callable[[int], Tensor]) -> Tensor:
    """Clean latents x0 of a block.

    flow(x, t) predicts v; `noise` is the start (σ = 1); after every step i but the last, x0 goes back to the next
    step's σ with fresh noise `renoise(i)`. Works in the dtype of `noise`: give it float32.
    """
    x = noise
    for i, t in enumerate(steps):
        x0 = x - t / TABLE * flow(x, t)
        if i + 1 < len(steps):
            sigma = steps[i + 1] / TABLE
            x = (1 - sigma) * x0 + sigma * renoise(i)
    return x0
