"""Whether what is written for Hopper GPUs is to be had on one: Triton, and Gluon in it, change with each version."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HEADS = 12  # of the attention that is tried: Wan 2.1 1.3B's, so that nothing is compiled for the trial alone
MOST = 0.1  # that a kernel may be off from its plain version, to the size of what that gives


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's Hopper generation."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def numbers(*shape: int, device: torch.device) -> Tensor:
    """Numbers between -1 and 1 to try a kernel with."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), device=device).mul(0.7).sin().view(shape)


def agrees(once: Callable[[], tuple[Tensor, Tensor]], otherwise: str) -> bool:
    """Whether a kernel compiles, runs and is right. once: what it makes of something small, and what its plain version
    does. Logs what else is done where it is not. Raises torch.OutOfMemoryError, which says nothing of that."""
    try:
        got, expected = (x.float() for x in once())
        off = ((got - expected).norm() / expected.norm()).item()
        reason = "" if off < MOST else f"the kernel is off by {off:.2f}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # neither Triton nor the driver has one type for what it can't do
        reason = " ".join(str(error).split())[:160]
    if reason:
        log.warning("%s: %s", otherwise, reason)
    return not reason
