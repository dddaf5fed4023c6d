"""Times of single operations on a GPU, for the scripts that choose between ways to do them."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 5


def milliseconds(call: Callable[[], object], calls: int = 20) -> float:
    """Of one call: the median of five rounds, after two calls that warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def draw(*shape: int) -> Tensor:
    """Random, as a GPU that multiplies zeros draws less power and runs faster than it would."""
    return torch.randn(shape, device="cuda").bfloat16()


def error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖."""
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()
