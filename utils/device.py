"""Device, dtype, and copies between host and device that do not make either wait."""

import os

import torch
from torch import Tensor

from utils.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str, index: int = 0) -> torch.device:
    """The device of a config: "auto" is the GPU `index` where there is one, else the CPU.

    Raises UserError for a name that is unknown or not available here.
    """
    if name == "auto":
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={name}, but PyTorch sees no CUDA GPU here; use device=auto or device=cpu")
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device={name}, but there are only {torch.cuda.device_count()} GPUs; use device=auto")
    elif device.type != "cpu":
        raise UserError(f"device={name} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config: "auto" is bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def same_on_any_thread_count() -> None:
    """Asks MKL for matrix products on the CPU whose last digits do not depend on the number of threads; they cost the
    same. It heeds this only before its first product in a process, and for some sizes not at all on processors that are
    not Intel's: there a pixel in 10,000 may be one step off in a video that was made with another number of threads."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what tensors on the CPU free for the next ones. As it starts it returns most of it to the
    system at once and gets it again page by page, each cleared: thousands of page faults a block. It keeps twice the
    largest piece of up to 32 MB that was ever freed, so one is, which no page is ever used of. Other allocators do not
    mind."""
    torch.empty(31 << 20, dtype=torch.uint8)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; where it comes from the host, without waiting for the device."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def download(tensor: Tensor) -> Tensor:
    """A tensor on the host, once the device has computed it."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return host


def memory_free(device: torch.device) -> int:
    """Bytes of GPU memory that can still be allocated."""
    return torch.cuda.mem_get_info(device)[0]
