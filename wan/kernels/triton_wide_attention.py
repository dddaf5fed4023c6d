"""Attention of one head of 384 channels, for which PyTorch's fast kernels are too narrow; the plain version is in
`wan.attention`.

A flash attention (Dao et al. 2023, arXiv:2307.08691) that holds queries, keys, values and sums in pieces of 128
channels. What a thread sums fills its registers, so a tile has few keys. Where the tiles do not fill the processors
evenly, `wan.waves` shares the last ones out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wan import waves

CHANNELS = 384
LOG2_E = 1.4426950408889634
PIECE = tl.constexpr(128)
TILE = (128, 32, 8, 2)  # queries and keys of a tile, warps, stages of loads: one tile fills a processor of Hopper


@triton.jit(do_not_specialize=["first", "queries", "keys"])
def _attention(queries_of, keys_of, values_of, out, log_sums, first, queries, keys, out_part_stride, out_sample_stride,
               factor, PIECES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ARE_PARTS: tl.constexpr):
    """Of the queries from `first` on. keys: of each part; ARE_PARTS: the sums are wanted too."""
    sample, part = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * M
    q = ()
    for piece in tl.static_range(PIECES):
        q += (queries_of.load([sample, first + row, piece * PIECE]).reshape(M, PIECE),)
    acc = (tl.zeros([M, PIECE], tl.float32),) * PIECES
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    end = (part + 1) * keys
    for start in range(part * keys, end, N):
        scores = tl.zeros([M, N], tl.float32)
        for piece in tl.static_range(PIECES):
            scores = tl.dot(q[piece], keys_of.load([sample, start, piece * PIECE]).reshape(N, PIECE).T, scores)
        scores = tl.where((start + tl.arange(0, N) < end)[None, :], scores * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fading = tl.exp2(top - new_top)
        total = total * fading + tl.sum(weights, 1)
        top = new_top
        weights = weights.to(values_of.dtype)
        sums = ()
        for piece in tl.static_range(PIECES):
            v = values_of.load([sample, start, piece * PIECE]).reshape(N, PIECE)
            sums += (tl.dot(weights, v, acc[piece] * fading[:, None]),)
        acc = sums
    row += tl.arange(0, M)
    inside = row < queries
    places = out + part * out_part_stride + sample.to(tl.int64) * out_sample_stride
    places += row[:, None] * (PIECES * PIECE) + tl.arange(0, PIECE)[None, :]
    inverse = 1.0 / total
    for piece in tl.static_range(PIECES):
        value = acc[piece] * inverse[:, None]
        tl.store(places + piece * PIECE, value.to(out.dtype.element_ty), inside[:, None])
    if ARE_PARTS:  # log2 of the sum of the exponentials
        tl.store(log_sums + (part * tl.num_programs(1) + sample) * queries + row, top + tl.log2(total), inside)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `wan.attention.one_head`, for CHANNELS channels of 16 bits on Hopper."""
    samples, queries, _ = q.shape
    keys, out = k.shape[1], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    first, parts = waves.shares(queries, keys, samples, TILE[0], waves.at_once(q.device, 1))
    _run(q, k, v, 0, out[:, :first])
    if parts > 1:
        some = torch.empty(parts, samples, queries - first, CHANNELS, dtype=torch.float32, device=q.device)
        sums = torch.empty(*some.shape[:-1], 1, dtype=torch.float32, device=q.device)
        _run(q, k, v, first, some, sums)
        # Samples are to it what heads are to others.
        waves.add_up(some.transpose(1, 2), sums.transpose(1, 2), out[None, :, first:].transpose(1, 2), base=2)
    return out


def _run(q: Tensor, k: Tensor, v: Tensor, first: int, out: Tensor, log_sums: Tensor | None = None) -> None:
    """Attention of the queries from `first` on, into out [N, S, C]. Where `log_sums` [parts, N, S, 1] are given, to
    each part of the keys, into out [parts, N, S, C], and log2 of the sums of the exponentials goes there."""
    parts = 1 if log_sums is None else len(out)
    samples, queries, channels = out.shape[-3:]
    m, n, warps, stages = TILE
    _attention[(triton.cdiv(queries, m), samples, parts)](
        TensorDescriptor.from_tensor(q, [1, m, PIECE.value]),
        *(TensorDescriptor.from_tensor(x, [1, n, PIECE.value]) for x in (k, v)), out, log_sums, first, queries,
        k.shape[1] // parts, 0 if log_sums is None else out.stride(0), out.stride(-3), LOG2_E * channels**-0.5,
        PIECES=channels // PIECE.value, M=m, N=n, ARE_PARTS=log_sums is not None, num_warps=warps, num_stages=stages,
    )
