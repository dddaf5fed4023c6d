"""Times what `precision: fp8` is made of, on this GPU and at the shapes of Wan 2.1 1.3B at 480×832: each matrix product
and kernel beside its bf16 one, and attention with several tiles beside PyTorch's bf16 attention.

The fastest tile belongs into `TILES` of wan/kernels/triton_fp8_attention.py, by the GPU's major compute capability.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan.attention import attention, fastest
from wan.kernels import fp8, gated, linear_gelu, modulate, rms_rope
from wan.model import WanConfig
from wan.rope import RotaryEmbedding

SIZES = WanConfig()
ROWS, COLUMNS, FRAMES, WINDOW = 30, 52, 3, 12
TOKENS = ROWS * COLUMNS * FRAMES  # of a block
HEADS, HEAD_DIM, DIM, FFN = SIZES.num_heads, SIZES.head_dim, SIZES.dim, SIZES.ffn_dim
# Queries and keys of a tile, warps, stages of loads.
TRIED = ((128, 128, 8, 3), (128, 128, 8, 2), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2),
         (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 256, 8, 2), (256, 64, 16, 3), (128, 128, 4, 3),
         (128, 32, 8, 3), (64, 32, 4, 3))


def milliseconds(call: Callable[[], object], calls: int = 20) -> float:
    """Of one call: the median of five rounds."""
    for _ in range(2):
        call()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def compare_tiles(keys_count: int) -> None:
    """Attention of a block to so many keys, with each tile."""
    from wan.kernels import triton_fp8_attention  # not before: Triton needs a GPU driver

    q, k, v = (draw(1, count, HEADS, HEAD_DIM) for count in (TOKENS, keys_count, keys_count))
    scale = torch.full((1, HEADS), 0.2, device="cuda")  # 16 times what the largest of these values needs
    keys = fp8.less_mean(k, torch.zeros(1, HEADS, HEAD_DIM, device="cuda"), scale)
    values = torch.empty(1, HEADS, HEAD_DIM, -(-keys_count // 16) * 16, device="cuda").to(fp8.E4M3)[..., :keys_count]
    fp8.write_values(v, scale, values)
    held, rows = fp8.Held(keys, values, scale, scale), fp8.quantise(q)
    some = fp8.Rows(rows.values[:, :512].contiguous(), rows.scale[:, :512].contiguous())
    exact = attention(q[:, :512].float(), k.float(), v.float())
    tflop = 4 * HEADS * TOKENS * keys_count * HEAD_DIM / 1e12
    with fastest(q.device):
        taken = milliseconds(lambda: attention(q, k, v))
    print(f"attention {TOKENS} × {keys_count}", flush=True)
    print(f"  {'bf16':20}{taken:8.3f} ms {1000 * tflop / taken:6.0f} TFLOP/s", flush=True)
    for tile in TRIED:
        triton_fp8_attention.TILES = dict.fromkeys(range(8, 13), tile)
        try:
            taken = milliseconds(lambda: fp8.attention(rows, held, torch.bfloat16))
            error = (fp8.attention(some, held, torch.float32) - exact).norm() / exact.norm()
        except Exception as failure:  # a tile that this GPU can't hold; Triton has no one type for it
            print(f"  {tile!s:20}{type(failure).__name__}: {' '.join(str(failure).split())[:80]}", flush=True)
            continue
        print(f"  {tile!s:20}{taken:8.3f} ms {1000 * tflop / taken:6.0f} TFLOP/s, off by {error:.4f}", flush=True)


def compare_kernels() -> None:
    x, e = draw(1, FRAMES, ROWS * COLUMNS, DIM), draw(1, FRAMES, 6, DIM)
    shift, scale, gate = e.split(1, 2)[:3]
    flat, wide, qkv, weight = x.flatten(1, 2), draw(1, TOKENS, FFN), draw(1, TOKENS, 3 * DIM), draw(DIM)
    turns = RotaryEmbedding(HEAD_DIM, ROWS, COLUMNS, "cuda").turns(9, FRAMES)
    q, k, v = qkv.chunk(3, -1)
    mean, one = torch.zeros(1, HEADS, HEAD_DIM, device="cuda"), torch.full((1, HEADS), 0.1, device="cuda")
    here = slice(TOKENS, 2 * TOKENS)
    keys = torch.empty(1, 4 * TOKENS, HEADS, HEAD_DIM, device="cuda").to(fp8.E4M3)[:, here]
    values = torch.empty(1, HEADS, HEAD_DIM, 4 * TOKENS, device="cuda").to(fp8.E4M3)[..., here]
    calls = {
        "modulate": lambda: modulate(x, shift, scale, 1e-6),
        "modulate_quantise": lambda: fp8.modulate_quantise(x, shift, scale, 1e-6),
        "gated": lambda: gated(x, gate, x),
        "quantise": lambda: fp8.quantise(flat),
        "gelu_quantise": lambda: fp8.gelu_quantise(wide),
        "rms_rope": lambda: rms_rope(q.contiguous(), weight, 1e-6, turns),
        "rms_rope_quantise": lambda: fp8.rms_rope_quantise(q, weight, 1e-6, turns),
        "write_keys": lambda: fp8.write_keys(k, weight, 1e-6, turns, mean, one, keys),
        "write_values": lambda: fp8.write_values(v.unflatten(-1, (HEADS, HEAD_DIM)), one, values),
    }
    for name, call in calls.items():
        print(f"{name:22}{1000 * milliseconds(call, 50):8.1f} µs", flush=True)


def compare_products() -> None:
    for inputs, outputs in ((DIM, DIM), (DIM, 3 * DIM), (DIM, FFN), (FFN, DIM)):
        x, weight, bias = draw(TOKENS, inputs), draw(outputs, inputs), draw(outputs)
        x8, weight8 = fp8.quantise(x[None]), fp8.quantise(weight)
        calls = {"bf16": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
                 "fp8": lambda x=x8, w=weight8, b=bias: fp8.linear(x, w, b)}
        if outputs == FFN:
            calls["bf16, GELU"] = lambda x=x, w=weight, b=bias: linear_gelu(x, w, b)
        for name, call in calls.items():
            taken = milliseconds(call, 30)
            speed = 2 * TOKENS * inputs * outputs / taken / 1e9
            print(f"{TOKENS} × {inputs} → {outputs}, {name:12}{1000 * taken:8.1f} µs {speed:6.0f} TFLOP/s", flush=True)


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here")
    compare_products()
    compare_kernels()
    for keys_count in (TOKENS, TOKENS // FRAMES * WINDOW):
        compare_tiles(keys_count)


if __name__ == "__main__":
    main()
