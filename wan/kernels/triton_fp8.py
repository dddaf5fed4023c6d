"""Triton versions of the element-wise parts of FP8; the plain ones are in `wan.kernels.fp8`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.fp8 import E4M3, LEAST

TOKENS = 64  # of a tile of values


@triton.jit
def _to_e4m3(x):
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _store_row(value, out, scales, row, channel, mask, least, DIM: tl.constexpr):
    """Writes a row in e4m3, and its scale."""
    largest = tl.maximum(tl.max(tl.abs(value), 0), least)
    tl.store(scales + row, largest / 448.0)
    tl.store(out + row * DIM + channel, _to_e4m3(value * (448.0 / largest)), mask)


@triton.jit
def _quantise(x, out, scales, least, DIM: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
    if GELU:  # (1 + tanh(u))/2 = sigmoid(2u), u = √(2/π)·(x + 0.044715·x³)
        value = value * tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * value * value))
    _store_row(value, out, scales, row, channel, mask, least, DIM)


@triton.jit
def _modulate_quantise(x, y, gate, sums, shift, scale, out, scales, per_frame, gate_stride, frame_stride, eps, least,
                       DIM: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, IS_GATED: tl.constexpr):
    """ADDS: first x + y, or x + gate·y, which goes to `sums`."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
    if ADDS:
        change = tl.load(y + row * DIM + channel, mask, other=0.0).to(tl.float32)
        if IS_GATED:
            change *= tl.load(gate + row // per_frame * gate_stride + channel, mask, other=0.0).to(tl.float32)
        rounded = (value + change).to(sums.dtype.element_ty)
        tl.store(sums + row * DIM + channel, rounded, mask)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / DIM
    centred = tl.where(mask, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    frame = row // per_frame * frame_stride + channel
    value = centred * inverse * (1 + tl.load(scale + frame, mask, other=0.0).to(tl.float32))
    value += tl.load(shift + frame, mask, other=0.0).to(tl.float32)
    _store_row(value, out, scales, row, channel, mask, least, DIM)


@triton.jit
def _rms_rope(x, weight, turns, token, channel, mask, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """A row of `wan.kernels.rms_rope`, [BLOCK]."""
    value = tl.load(x + channel, mask, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps)
    value = value * tl.load(weight + channel, mask, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(value, [BLOCK // 2, 2]))
    pair = tl.arange(0, BLOCK // 2)
    turn = turns + token * D + pair % (D // 2) * 2
    cos = tl.load(turn, pair < DIM // 2, other=0.0)
    sin = tl.load(turn + 1, pair < DIM // 2, other=0.0)
    return tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [BLOCK])


@triton.jit(do_not_specialize=["tokens"])
def _rms_rope_quantise(x, weight, turns, out, scales, tokens, row_stride, eps, least, DIM: tl.constexpr,
                       BLOCK: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = _rms_rope(x + row * row_stride, weight, turns, row % tokens, channel, mask, eps, DIM, BLOCK, D)
    heads = tl.reshape(value, [BLOCK // D, D])
    largest = tl.maximum(tl.max(tl.abs(heads), 1), least)
    head = tl.arange(0, BLOCK // D)
    tl.store(scales + row * (DIM // D) + head, largest / 448.0, head < DIM // D)
    value = tl.reshape(heads * (448.0 / largest)[:, None], [BLOCK])
    tl.store(out + row * DIM + channel, _to_e4m3(value), mask)


@triton.jit(do_not_specialize=["tokens"])
def _write_keys(x, weight, turns, mean, scale, out, tokens, row_stride, sample_stride, eps, DIM: tl.constexpr,
                BLOCK: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = _rms_rope(x + row * row_stride, weight, turns, token, channel, mask, eps, DIM, BLOCK, D)
    value -= tl.load(mean + sample * DIM + channel, mask, other=0.0)
    value /= tl.load(scale + sample * (DIM // D) + channel // D, mask, other=1.0)
    tl.store(out + sample * sample_stride + token * DIM + channel, _to_e4m3(value), mask)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["out"])
def _write_values(x, scale, out, tokens, sample_stride, token_stride, out_sample_stride, out_row_stride,
                  H: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr):
    """ALIGNED: what divides `tokens` and all that `out` begins at; so many tokens are stored at once."""
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, D)
    places = token[:, None].to(tl.int64) * token_stride + head * D + channel[None, :]
    value = tl.load(x + sample * sample_stride + places, (token < tokens)[:, None], other=0.0).to(tl.float32)
    value = tl.trans(value / tl.load(scale + sample * H + head))
    places = (head * D + channel).to(tl.int64)[:, None] * tl.multiple_of(out_row_stride, ALIGNED) + token[None, :]
    start = tl.multiple_of(out + sample * out_sample_stride, ALIGNED)
    inside = tl.max_constancy(token < tokens, ALIGNED)
    tl.store(start + places, _to_e4m3(value), inside[None, :])


def _row_sizes(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "BLOCK": block, "num_warps": 4 if block <= 4096 else 16}


def _empty_rows(shape: torch.Size | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return (torch.empty(shape, dtype=E4M3, device=device),
            torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device))


def quantise(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    x, dim = x.contiguous(), x.shape[-1]
    out, scales = _empty_rows(x.shape, x.device)
    _quantise[(x.numel() // dim,)](x, out, scales, LEAST, GELU=gelu, **_row_sizes(dim))
    return out, scales


def modulate_quantise(x: Tensor, shift: Tensor, scale: Tensor, eps: float, y: Tensor | None = None,
                      gate: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, or of x + y, or x + gate·y, which is returned first."""
    x, (batch, frames, tokens, dim) = x.contiguous(), x.shape
    sums = x if y is None else torch.empty_like(x)
    out, scales = _empty_rows((batch, frames * tokens, dim), x.device)
    gate_stride = 0 if gate is None else _frame_stride(gate, gate, batch * frames)
    _modulate_quantise[(batch * frames * tokens,)](
        x, x if y is None else y.contiguous(), x if gate is None else gate, sums, shift, scale, out, scales, tokens,
        gate_stride, _frame_stride(shift, scale, batch * frames), eps, LEAST, ADDS=y is not None,
        IS_GATED=gate is not None, **_row_sizes(dim),
    )
    return sums, out, scales


def rms_rope_quantise(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> tuple[Tensor, Tensor]:
    (batch, tokens, dim), head_dim = x.shape, 2 * turns.shape[-1]
    out, scales = _empty_rows((batch, tokens, dim // head_dim, head_dim), x.device)
    _rms_rope_quantise[(batch * tokens,)](x, weight, torch.view_as_real(turns), out, scales, tokens, _row_stride(x),
                                          eps, LEAST, D=head_dim, **_row_sizes(dim))
    return out, scales


def write_keys(x: Tensor, weight: Tensor, eps: float, turns: Tensor, mean: Tensor, scale: Tensor, out: Tensor) -> None:
    (batch, tokens, dim), head_dim = x.shape, 2 * turns.shape[-1]
    if out.stride()[1:] != (dim, head_dim, 1):
        raise ValueError(f"keys of strides {out.stride()} are not rows of {dim}")
    _write_keys[(batch * tokens,)](x, weight, torch.view_as_real(turns), mean, scale, out, tokens, _row_stride(x),
                                   out.stride(0), eps, D=head_dim, **_row_sizes(dim))


def write_values(x: Tensor, scale: Tensor, out: Tensor) -> None:
    batch, tokens, heads, head_dim = x.shape
    if x.stride()[2:] != (head_dim, 1) or out.stride(-1) != 1 or out.stride(1) != head_dim * out.stride(2):
        raise ValueError(f"values of strides {x.stride()} do not go to {out.stride()}")
    _write_values[(triton.cdiv(tokens, TOKENS), heads, batch)](
        x, scale, out, tokens, x.stride(0), x.stride(1), out.stride(0), out.stride(2), H=heads, D=head_dim,
        TOKENS=TOKENS, ALIGNED=math.gcd(out.data_ptr(), out.stride(0), out.stride(2), tokens, 8),
    )


def _row_stride(x: Tensor) -> int:
    """Distance in memory from a row of x [B, S, dim] to the next, which may be a slice of longer rows."""
    stride = x.stride(1)
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != stride * x.shape[1]):
        raise ValueError(f"rows with strides {x.stride()} are not evenly spaced")
    return stride


def _frame_stride(shift: Tensor, scale: Tensor, frames: int) -> int:
    """Distance in memory from a frame's modulation to the next one's; 0 where all frames have the same."""
    if shift.stride() != scale.stride() or shift.stride(-1) != 1:
        raise ValueError(f"modulation with strides {shift.stride()} and {scale.stride()} is not alike")
    if shift.numel() == shift.shape[-1]:
        return 0
    stride = shift.stride(1)
    if shift.shape[0] * shift.shape[1] != frames or shift.stride(0) != stride * shift.shape[1]:
        raise ValueError(f"modulation {list(shift.shape)} with strides {shift.stride()} is not evenly spaced by frame")
    return stride
