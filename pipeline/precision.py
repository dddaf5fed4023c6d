"""`precision` of the config: what generator and decoder compute in, and whether they can here."""

import torch

from utils.errors import UserError
from wan import fp8_decoder
from wan.fp8 import to_fp8
from wan.kernels import HAS_TRITON
from wan.kernels.fp8 import HEAD_DIMS, linear, quantise
from wan.model import CausalWan, WanConfig
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE

OLDEST = (8, 9)  # compute capability of the first GPUs that multiply e4m3
MEND = "use precision=full"


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError where `device` can't compute in `precision`."""
    if precision == "full":
        return
    needs = "precision=fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"{needs}, the device is {device.type}; {MEND}")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability < OLDEST:
        raise UserError(f"{needs}, the device is {name}, {'.'.join(map(str, capability))}; {MEND}")
    if not HAS_TRITON:
        raise UserError(f"precision=fp8 needs Triton, which is not installed; pip install triton, or {MEND}")
    try:
        multiply_once(device)
    except (RuntimeError, ValueError, AttributeError) as error:  # of a GPU or a PyTorch that has no such product
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"precision=fp8: PyTorch {torch.__version__} and Triton can't multiply 8 bits on {name} "
                        f"({reason}); {MEND}") from None


def multiply_once(device: torch.device) -> None:
    """A small product."""
    rows = quantise(torch.zeros(32, 32, device=device))
    linear(rows, rows, torch.zeros(32, device=device, dtype=torch.bfloat16))
    torch.cuda.synchronize(device)


def check_sizes(precision: str, sizes: WanConfig) -> None:
    """Raises UserError for a generator whose sizes `precision` can't do on a GPU."""
    if precision == "full":
        return
    if sizes.head_dim not in HEAD_DIMS:
        raise UserError(f"precision=fp8 needs heads of {' or '.join(map(str, HEAD_DIMS))} channels, the generator's "
                        f"have {sizes.head_dim}; {MEND}")
    for what, size in (("dim", sizes.dim), ("ffn_dim", sizes.ffn_dim)):
        if size % 16:
            raise UserError(f"precision=fp8 needs a generator whose {what} is a multiple of 16, it is {size}; {MEND}")


def in_precision(model: CausalWan, precision: str, device: torch.device) -> CausalWan:
    """The model, in FP8 where that is asked for; its blocks are then on `device`.

    Raises UserError where the device can't do it, or not with this model.
    """
    check_precision(precision, device)
    check_sizes(precision, model.config)
    return to_fp8(model, device) if precision == "fp8" else model


def decoder_in_precision(decoder: WanVAE | TinyDecoder, precision: str,
                         device: torch.device) -> WanVAE | TinyDecoder:
    """The decoder; in FP8 that of Wan's VAE has 8 bits where this makes it faster on `device`, and nowhere else."""
    if precision == "fp8" and isinstance(decoder, WanVAE):
        return fp8_decoder.to_fp8(decoder, device)
    return decoder
