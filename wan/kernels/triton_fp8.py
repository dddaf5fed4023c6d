"""Triton versions of the element-wise parts of the 8-bit blocks; the plain ones are in `wan.kernels.fp8`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.kernels.fp8 import LEAST, share_scales

TOKENS = 64  # of a tile of values


@triton.jit
def _to_e4m3(x):
    return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(value, axis: tl.constexpr, least):
    """Of the sizes of `value`, or `least`; no number where one of them is none."""
    return _larger(tl.reduce(tl.abs(value), axis, _larger), least)


@triton.jit
def _to_int8(x):
    """Rounded, of values up to 127 in size. With 1.5·2^23 added a float32 has the integer in its last bits, which takes
    no conversion: GPUs do few of those at a time."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store_row(values, out, scale, least, DIM: tl.constexpr, PIECE: tl.constexpr):
    """Writes a row, of which `values` are the pieces, in int8, and its scale."""
    sizes = tl.zeros([PIECE], tl.float32)
    for piece in tl.static_range(len(values)):
        sizes = _larger(sizes, tl.abs(values[piece]))
    largest = _largest(sizes, 0, least)
    tl.store(scale, largest / 127.0)
    steps = 127.0 / largest
    for piece in tl.static_range(len(values)):
        channel = piece * PIECE + tl.arange(0, PIECE)
        tl.store(out + channel, _to_int8(values[piece] * steps), channel < DIM)


@triton.jit
def _quantise(x, smooth, out, scales, least, DIM: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
              SMOOTHS: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = ()
    for piece in tl.static_range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        mask = channel < DIM
        value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
        if GELU:  # x·(1 + tanh(u))/2 = x/(1 + exp(−2u)), u = √(2/π)·(x + 0.044715·x³)
            root = tl.rsqrt(1.0 + tl.exp2(value * (-2.3022082 - 0.10294324 * value * value)))
            value = value * root * root  # quicker than a division
        if SMOOTHS:
            value *= tl.load(smooth + channel, mask, other=0.0)
        values += (value,)
    _store_row(values, out + row * DIM, scales + row, least, DIM, PIECE)


@triton.jit
def _modulate_quantise(x, y, sums, shift, scale, smooth, out, scales, per_frame, frame_stride, eps, least,
                       DIM: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, ADDS: tl.constexpr):
    """ADDS: first x + y, which goes to `sums`."""
    row = tl.program_id(0).to(tl.int64)
    loaded, total = (), tl.zeros([PIECE], tl.float32)
    for piece in tl.static_range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        mask = channel < DIM
        value = tl.load(x + row * DIM + channel, mask, other=0.0).to(tl.float32)
        if ADDS:
            value += tl.load(y + row * DIM + channel, mask, other=0.0).to(tl.float32)
            rounded = value.to(sums.dtype.element_ty)
            tl.store(sums + row * DIM + channel, rounded, mask)
            value = rounded.to(tl.float32)
        loaded += (value,)
        total += value
    mean = tl.sum(total, 0) / DIM
    centred, squares = (), tl.zeros([PIECE], tl.float32)
    for piece in tl.static_range(PIECES):
        value = tl.where(piece * PIECE + tl.arange(0, PIECE) < DIM, loaded[piece] - mean, 0.0)
        centred += (value,)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
    values = ()
    for piece in tl.static_range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        mask, frame = channel < DIM, row // per_frame * frame_stride + channel
        value = centred[piece] * inverse * (1 + tl.load(scale + frame, mask, other=0.0).to(tl.float32))
        value += tl.load(shift + frame, mask, other=0.0).to(tl.float32)
        values += (value * tl.load(smooth + channel, mask, other=0.0),)
    _store_row(values, out + row * DIM, scales + row, least, DIM, PIECE)


@triton.jit(do_not_specialize=["tokens"])
def _rms_rope_quantise(x, weight, turns, mean, out, scales, tokens, row_stride, out_sample_stride, scale_sample_stride,
                       scale_head_stride, scale_token_stride, eps, least, DIM: tl.constexpr, PIECES: tl.constexpr,
                       PIECE: tl.constexpr, D: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_SCALES: tl.constexpr,
                       ONLY_SIZES: tl.constexpr):
    """HAS_SCALES: those are there, and are used. ONLY_SIZES: the size of the largest number of each head, as if it were
    its scale, and nothing else."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    loaded, squares = (), tl.zeros([PIECE], tl.float32)
    for piece in tl.static_range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        value = tl.load(x + row * row_stride + channel, channel < DIM, other=0.0).to(tl.float32)
        loaded += (value,)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares, 0) / DIM + eps)
    turn = tl.load(turns + token * D + tl.arange(0, PIECE) % D)
    cos, sin = tl.split(tl.reshape(turn, [PIECE // 2, 2]))
    for piece in tl.static_range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        mask = channel < DIM
        value = loaded[piece] * inverse * tl.load(weight + channel, mask, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(value, [PIECE // 2, 2]))
        value = tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [PIECE])
        if HAS_MEAN:
            value -= tl.load(mean + sample * DIM + channel, mask, other=0.0)
        heads = tl.reshape(value, [PIECE // D, D])
        head = piece * (PIECE // D) + tl.arange(0, PIECE // D)
        inside = head < DIM // D
        places = scales + sample * scale_sample_stride + head * scale_head_stride + token * scale_token_stride
        if ONLY_SIZES:
            tl.store(places, _largest(heads, 1, least), inside)
        else:
            if HAS_SCALES:
                steps = 1.0 / tl.load(places, inside, other=1.0)
            else:
                largest = _largest(heads, 1, least)
                tl.store(places, largest / 127.0, inside)
                steps = 127.0 / largest
            value = tl.reshape(heads * steps[:, None], [PIECE])
            tl.store(out + sample * out_sample_stride + token * DIM + channel, _to_int8(value), mask)


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
    """A row is held in pieces, for in a single one, of a power of two, almost half would lie idle where dim is 8960."""
    warps = 2 if dim <= 2048 else 4
    piece = min(triton.next_power_of_2(dim), 256 * warps)  # 16 bytes in bfloat16 for each thread
    return {"DIM": dim, "PIECES": triton.cdiv(dim, piece), "PIECE": piece, "num_warps": warps}


def _empty_rows(shape: torch.Size | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return (torch.empty(shape, dtype=torch.int8, device=device),
            torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device))


def quantise(x: Tensor, smooth: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    x, dim = x.contiguous(), x.shape[-1]
    out, scales = _empty_rows(x.shape, x.device)
    _quantise[(x.numel() // dim,)](x, x if smooth is None else smooth, out, scales, LEAST, SMOOTHS=smooth is not None,
                                   GELU=gelu, **_row_sizes(dim))
    return out, scales


def modulate_quantise(x: Tensor, shift: Tensor, scale: Tensor, eps: float, smooth: Tensor,
                      y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, or of x + y, which is returned first."""
    x, (batch, frames, tokens, dim) = x.contiguous(), x.shape
    sums = x if y is None else torch.empty_like(x)
    out, scales = _empty_rows((batch, frames * tokens, dim), x.device)
    _modulate_quantise[(batch * frames * tokens,)](
        x, x if y is None else y.contiguous(), sums, shift, scale, smooth, out, scales, tokens,
        _frame_stride(shift, scale, batch * frames), eps, LEAST, ADDS=y is not None, **_row_sizes(dim),
    )
    return sums, out, scales


def rms_rope_quantise(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> tuple[Tensor, Tensor]:
    (batch, tokens, dim), head_dim = x.shape, 2 * turns.shape[-1]
    out, scales = _empty_rows((batch, tokens, dim // head_dim, head_dim), x.device)
    _launch_rms_rope(x, weight, eps, turns, None, out, scales[..., 0].transpose(1, 2))
    return out, scales


def write_keys(x: Tensor, weight: Tensor, eps: float, turns: Tensor, mean: Tensor, out: Tensor, scale: Tensor,
               run: int) -> None:
    """Computes x twice, to know the largest before anything is rounded: faster than to write it down between."""
    if out.stride()[1:] != (x.shape[-1], out.shape[-1], 1):
        raise ValueError(f"keys of strides {out.stride()} are not rows of {x.shape[-1]}")
    sizes = torch.empty_like(scale, memory_format=torch.contiguous_format)
    _launch_rms_rope(x, weight, eps, turns, mean, out, sizes, only_sizes=True)
    share_scales(sizes, run, scale)
    _launch_rms_rope(x, weight, eps, turns, mean, out, scale, has_scales=True)


def _launch_rms_rope(x: Tensor, weight: Tensor, eps: float, turns: Tensor, mean: Tensor | None, out: Tensor,
                     scale: Tensor, has_scales: bool = False, only_sizes: bool = False) -> None:
    """scale [B, H, S]."""
    batch, tokens, dim = x.shape
    _rms_rope_quantise[(batch * tokens,)](
        x, weight, torch.view_as_real(turns), x if mean is None else mean, out, scale, tokens, _row_stride(x),
        out.stride(0), *scale.stride(), eps, LEAST, D=out.shape[-1], HAS_MEAN=mean is not None, HAS_SCALES=has_scales,
        ONLY_SIZES=only_sizes, **_row_sizes(dim),
    )


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
    """Distance in memory from a frame's modulation to the next one's."""
    if shift.stride() != scale.stride() or shift.stride(-1) != 1:
        raise ValueError(f"modulation with strides {shift.stride()} and {scale.stride()} is not alike")
    stride = shift.stride(1)
    if shift.shape[0] * shift.shape[1] != frames or shift.stride(0) != stride * shift.shape[1]:
        raise ValueError(f"modulation {list(shift.shape)} with strides {shift.stride()} is not evenly spaced by frame")
    return stride
