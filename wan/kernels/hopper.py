"""Whether what is written for Hopper GPUs is to be had on one: Triton, and Gluon in it, change with each version."""

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def succeeds(once: Callable[[], object], device: torch.device, otherwise: str) -> bool:
    """Whether `once`, which compiles a kernel and runs it on something small, gets through. Logs what else is done."""
    try:
        once()
        torch.cuda.synchronize(device)
    except Exception as error:  # neither Triton nor the driver has one type for what it can't do
        log.warning("%s: %s", otherwise, " ".join(str(error).split())[:160])
        return False
    return True
