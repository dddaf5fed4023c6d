"""Triton versions of the element-wise parts of the transformer; the plain ones are in `wan.kernels`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _modulate(x, shift, scale, out, per_frame, frame_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / DIM
    centred = tl.where(mask, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    frame = row // per_frame * frame_stride + channel
    scaled = centred * inverse * (1 + tl.load(scale + frame, mask, other=0.0).to(tl.float32))
    value = scaled + tl.load(shift + frame, mask, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + channel, value.to(out.dtype.element_ty), mask)


@triton.jit
def _gated(x, gate, y, out, per_frame, frame_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask).to(tl.float32)
    change = tl.load(y + row * DIM + channel, mask).to(tl.float32)
    factor = tl.load(gate + row // per_frame * frame_stride + channel, mask).to(tl.float32)
    tl.store(out + row * DIM + channel, (value + factor * change).to(out.dtype.element_ty), mask)


@triton.jit
def _sum_norm(x, gate, y, shift, scale, sums, out, per_frame, gate_stride, frame_stride, eps, DIM: tl.constexpr,
              BLOCK: tl.constexpr, IS_GATED: tl.constexpr):
    """IS_GATED: y times a gate, and LayerNorm with weights; else y as it is, and LayerNorm that is modulated."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
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
    factor = tl.load(scale + frame, mask, other=0.0).to(tl.float32)
    if not IS_GATED:
        factor += 1
    value = centred * inverse * factor + tl.load(shift + frame, mask, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + channel, value.to(out.dtype.element_ty), mask)


@triton.jit
def _rms_rope_row(x, weight, turns, out, sample_stride, tokens, eps, DIM: tl.constexpr, BLOCK: tl.constexpr,
                  PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    mask = channel < DIM
    value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps)
    value = value * tl.load(weight + channel, mask, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(value, [BLOCK // 2, 2]))
    pair = tl.arange(0, BLOCK // 2)
    turn = turns + token * PAIRS * 2 + pair % PAIRS * 2
    cos = tl.load(turn, pair < DIM // 2, other=0.0)
    sin = tl.load(turn + 1, pair < DIM // 2, other=0.0)
    turned = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    place = out + sample * sample_stride + token * DIM + channel
    tl.store(place, tl.reshape(turned, [BLOCK]).to(out.dtype.element_ty), mask)


@triton.jit
def _rms_rope(x, weight, out, sample_stride, x2, weight2, out2, sample_stride2, turns, tokens, eps, DIM: tl.constexpr,
              BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Of x, and in a second column of programs, where there is one, of x2."""
    if tl.program_id(1) == 0:
        _rms_rope_row(x, weight, turns, out, sample_stride, tokens, eps, DIM, BLOCK, PAIRS)
    else:
        _rms_rope_row(x2, weight2, turns, out2, sample_stride2, tokens, eps, DIM, BLOCK, PAIRS)


def _grid(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """One program for each row of x, and the constants that say how long a row is."""
    dim = x.shape[-1]
    return (x.numel() // dim,), {"DIM": dim, "BLOCK": triton.next_power_of_2(dim), "num_warps": 4}


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x, (grid, sizes) = x.contiguous(), _grid(x)
    out = torch.empty_like(x)
    _modulate[grid](x, shift, scale, out, x.shape[2], _frame_stride(shift, scale), eps, **sizes)
    return out


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    x, y, (grid, sizes) = x.contiguous(), y.contiguous(), _grid(x)
    out = torch.empty_like(x)
    _gated[grid](x, gate, y, out, x.shape[2], _frame_stride(gate, gate), **sizes)
    return out


def sum_norm(x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor,
             eps: float) -> tuple[Tensor, Tensor]:
    """With a gate shift and scale are [dim], LayerNorm's own; without one they modulate."""
    x, y, (grid, sizes) = x.contiguous(), y.contiguous(), _grid(x)
    sums, out = torch.empty_like(x), torch.empty_like(x)
    strides = (0, _frame_stride(shift, scale)) if gate is None else (_frame_stride(gate, gate), 0)
    _sum_norm[grid](x, x if gate is None else gate, y, shift, scale, sums, out, x.shape[2], *strides, eps,
                    IS_GATED=gate is not None, **sizes)
    return sums, out


def rms_rope(x: Tensor, weight: Tensor, eps: float, turns: Tensor, out: Tensor | None = None) -> Tensor:
    x, ((rows,), sizes) = x.contiguous(), _grid(x)
    out, stride = _place(x, turns, out)
    _rms_rope[rows, 1](x, weight, out, stride, x, weight, out, stride, torch.view_as_real(turns), x.shape[1], eps,
                       PAIRS=turns.shape[-1], **sizes)
    return out


def rms_rope_both(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, turns: Tensor,
                  out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, ((rows,), sizes) = q.contiguous(), k.contiguous(), _grid(q)
    (turned, stride), (out, out_stride) = _place(q, turns, None), _place(k, turns, out)
    _rms_rope[rows, 2](q, q_weight, turned, stride, k, k_weight, out, out_stride, torch.view_as_real(turns), q.shape[1],
                       eps, PAIRS=turns.shape[-1], **sizes)
    return turned, out


def _place(x: Tensor, turns: Tensor, out: Tensor | None) -> tuple[Tensor, int]:
    """Where the heads [B, S, H, D] of x [B, S, dim] go, made unless it is given, and a sample's distance to the next;
    the rows of a sample must follow each other."""
    heads = x.unflatten(-1, (-1, 2 * turns.shape[-1]))
    if out is None:
        out = torch.empty_like(heads)
    if out.shape != heads.shape or out.stride()[1:] != heads.stride()[1:]:
        raise ValueError(f"out {list(out.shape)} of strides {out.stride()} can't take {list(heads.shape)} row by row")
    return out, out.stride(0)


def _frame_stride(a: Tensor, b: Tensor) -> int:
    """Distance in memory from a frame's modulation to the next one's, for two alike tensors [B, F, 1, dim]."""
    stride = a.stride(1)
    if a.stride() != b.stride() or a.stride(-1) != 1 or a.stride(0) != stride * a.shape[1]:
        raise ValueError(f"modulation with strides {a.stride()} and {b.stride()} is not evenly spaced by frame")
    return stride
