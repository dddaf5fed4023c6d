"""Times what a pass is made of, on this GPU and at the shapes of Wan 2.1 1.3B at 480×832: each matrix product and
kernel in full precision and with 8 bits, of one block and of two at once, and attention, in bfloat16 beside PyTorch's
and with 8 bits with several tiles.

The fastest tiles belong into `TILES` of wan/kernels/triton_fp8_attention.py and wan/kernels/triton_int8_linear.py, by
the GPU's major compute capability.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarking.clock import draw, error, milliseconds
from wan.attention import attention, fastest, pytorchs
from wan.kernels import fp8, gated, linear_gelu, modulate, rms_rope, rms_rope_both
from wan.model import WanConfig
from wan.rope import RotaryEmbedding

SIZES = WanConfig()
ROWS, COLUMNS, FRAMES, WINDOW = 30, 52, 3, 12
TOKENS = ROWS * COLUMNS * FRAMES  # of a block
HEADS, HEAD_DIM, DIM, FFN = SIZES.num_heads, SIZES.head_dim, SIZES.dim, SIZES.ffn_dim
# Queries and keys of a tile, warps, stages of loads, registers of a thread at most.
TRIED = ((128, 128, 8, 3, None), (128, 128, 8, 2, None), (64, 128, 4, 3, None), (64, 128, 4, 2, None),
         (64, 128, 4, 2, 168), (64, 64, 4, 3, None), (64, 64, 4, 3, 168), (64, 64, 4, 4, 168), (128, 64, 8, 3, None),
         (128, 64, 8, 4, None), (128, 256, 8, 2, None), (128, 32, 8, 3, None), (64, 32, 4, 3, None))
# Rows, outputs and inputs of a tile, warps, stages of loads.
TRIED_IN_LINEAR = ((128, 256, 128, 8, 4), (128, 256, 128, 8, 3), (128, 256, 64, 8, 4), (256, 128, 128, 8, 4),
                   (256, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 4, 3), (128, 128, 128, 4, 4),
                   (64, 256, 128, 4, 3), (128, 192, 128, 8, 4), (128, 128, 64, 8, 3))


def compare_tiles(keys_count: int, found: dict) -> None:
    """Attention of a block to so many keys, with each tile."""
    from wan.kernels import triton_fp8_attention  # not before: Triton needs a GPU driver

    q, k, v = (draw(1, count, HEADS, HEAD_DIM) for count in (TOKENS, keys_count, keys_count))
    scale = torch.full((1, HEADS), 0.2, device="cuda")  # 16 times what the largest of these values needs
    room, latent = -(-keys_count // 16) * 16, TOKENS // FRAMES
    keys = torch.empty(1, room, HEADS, HEAD_DIM, device="cuda", dtype=torch.int8)[:, :keys_count]
    key_scale = torch.empty(1, HEADS, keys_count, device="cuda")
    fp8.write_less_mean(k, torch.zeros(1, HEADS, HEAD_DIM, device="cuda"), keys, key_scale, latent)
    values = torch.empty(1, HEADS, HEAD_DIM, room, device="cuda").to(fp8.E4M3)[..., :keys_count]
    fp8.write_values(v, scale, values)
    held, rows = fp8.Held(keys, values, key_scale, scale, latent), fp8.quantise(q)
    some = fp8.Rows(rows.values[:, :512].contiguous(), rows.scale[:, :512].contiguous())
    exact = attention(q[:, :512].float(), k.float(), v.float())
    tflop = 4 * HEADS * TOKENS * keys_count * HEAD_DIM / 1e12

    def by_tiles(q: fp8.Rows, held: fp8.Held, dtype: torch.dtype) -> torch.Tensor:
        return triton_fp8_attention.attention(q.values, q.scale, *held, dtype)

    with fastest(q.device):
        found["bf16"] = taken = milliseconds(lambda: attention(q, k, v))
    print(f"attention {TOKENS} × {keys_count}", flush=True)
    print(f"  {'bf16':26}{taken:8.3f} ms {1000 * tflop / taken:6.0f} TFLOP/s", flush=True)
    for tile in ("as chosen for this GPU", *TRIED):
        call = fp8.attention
        if tile in TRIED:
            triton_fp8_attention.TILES = dict.fromkeys(range(8, 13), tile)
            call = by_tiles
        try:
            found[str(tile)] = taken = milliseconds(lambda call=call: call(rows, held, torch.bfloat16), 10)
            off = error(call(some, held, torch.float32), exact)
        except Exception as failure:  # a tile that this GPU can't hold; Triton has no one type for it
            print(f"  {tile!s:26}{type(failure).__name__}: {' '.join(str(failure).split())[:80]}", flush=True)
            continue
        print(f"  {tile!s:26}{taken:8.3f} ms {1000 * tflop / taken:6.0f} TFLOP/s, off by {off:.4f}", flush=True)


def compare_attention(keys_count: int, found: dict) -> None:
    """Attention of a block to so many keys in bfloat16, by PyTorch and as `wan.attention` computes it."""
    q, k, v = (draw(1, count, HEADS, HEAD_DIM) for count in (TOKENS, keys_count, keys_count))
    print(f"attention {TOKENS} × {keys_count} in bfloat16", flush=True)
    with fastest(q.device):
        exact = attention(q.float(), k.float(), v.float())
        for name, call in (("PyTorch's", pytorchs), ("as chosen for this GPU", attention)):
            found[name] = taken = milliseconds(lambda call=call: call(q, k, v))
            speed = 4 * HEADS * TOKENS * keys_count * HEAD_DIM / taken / 1e9
            off = error(call(q, k, v), exact)
            print(f"  {name:26}{taken:8.3f} ms {speed:6.0f} TFLOP/s, off by {off:.5f}", flush=True)


def compare_kernels(found: dict) -> None:
    x, e = draw(1, FRAMES, ROWS * COLUMNS, DIM), draw(1, FRAMES, 6, DIM)
    shift, scale, gate = e.split(1, 2)[:3]
    smooth = torch.ones(FFN, device="cuda")
    flat, wide, qkv, weight = x.flatten(1, 2), draw(1, TOKENS, FFN), draw(1, TOKENS, 3 * DIM), draw(DIM)
    turns = RotaryEmbedding(HEAD_DIM, ROWS, COLUMNS, "cuda").turns(9, FRAMES)
    q, k, v = qkv.chunk(3, -1)
    mean, one = torch.zeros(1, HEADS, HEAD_DIM, device="cuda"), torch.full((1, HEADS), 0.1, device="cuda")
    here = slice(TOKENS, 2 * TOKENS)
    keys = torch.empty(1, 4 * TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.int8)[:, here]
    key_scale = torch.empty(1, HEADS, 4 * TOKENS, device="cuda")[..., here]
    values = torch.empty(1, HEADS, HEAD_DIM, 4 * TOKENS, device="cuda").to(fp8.E4M3)[..., here]
    calls = {
        "modulate": lambda: modulate(x, shift, scale, 1e-6),
        "modulate_quantise": lambda: fp8.modulate_quantise(x, shift, scale, 1e-6, smooth),
        "gated": lambda: gated(x, gate, x),
        "quantise": lambda: fp8.quantise(flat),
        "gelu_quantise": lambda: fp8.gelu_quantise(wide, smooth),
        "rms_rope": lambda: rms_rope(q.contiguous(), weight, 1e-6, turns),
        "rms_rope_both": lambda: rms_rope_both(q.contiguous(), k.contiguous(), weight, weight, 1e-6, turns),
        "rms_rope_quantise": lambda: fp8.rms_rope_quantise(q, weight, 1e-6, turns),
        "write_keys": lambda: fp8.write_keys(k, weight, 1e-6, turns, mean, keys, key_scale, TOKENS // FRAMES),
        "write_values": lambda: fp8.write_values(v.unflatten(-1, (HEADS, HEAD_DIM)), one, values),
    }
    for name, call in calls.items():
        found[name] = taken = milliseconds(call, 50)
        print(f"{name:22}{1000 * taken:8.1f} µs", flush=True)


def compare_products(found: dict) -> None:
    """Each linear layer of a block's tokens and, as if the clean pass of a block ran with the first denoising pass of
    the next, of two blocks'. q, k and v are three products of the first kind, or one of the second."""
    for inputs, outputs in ((DIM, DIM), (DIM, 3 * DIM), (DIM, FFN), (FFN, DIM)):
        weight, bias = draw(outputs, inputs), draw(outputs)
        weight8 = fp8.quantise(weight)
        for rows in (TOKENS, 2 * TOKENS):
            x = draw(rows, inputs)
            x8 = fp8.quantise(x[None])
            calls = {"bf16": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
                     "int8": lambda x=x8, w=weight8, b=bias: fp8.linear(x, w, b)}
            if outputs == FFN:
                calls["bf16, GELU"] = lambda x=x, w=weight, b=bias: linear_gelu(x, w, b)
            for name, call in calls.items():
                taken, what = milliseconds(call, 30), f"{rows} × {inputs} → {outputs}, {name}"
                found[what] = taken
                speed = 2 * rows * inputs * outputs / taken / 1e9
                print(f"{what:34}{1000 * taken:8.1f} µs {speed:6.0f} TFLOP/s", flush=True)
    report_two_at_once(found)


def compare_linear_tiles(found: dict) -> None:
    """The layers that a block computes with int8, with each tile."""
    from wan.kernels import triton_int8_linear

    for inputs, outputs in ((DIM, 3 * DIM), (DIM, FFN), (FFN, DIM)):
        x, weight = fp8.quantise(draw(1, TOKENS, inputs)), fp8.quantise(draw(outputs, inputs))
        bias = draw(outputs)
        print(f"int8 {TOKENS} × {inputs} → {outputs}", flush=True)
        for tile in TRIED_IN_LINEAR:
            triton_int8_linear.TILES = dict.fromkeys(range(8, 13), tile)
            try:
                taken = milliseconds(lambda x=x, w=weight, b=bias: fp8.linear(x, w, b), 30)
            except Exception as failure:  # a tile that this GPU can't hold; Triton has no one type for it
                print(f"  {tile!s:26}{type(failure).__name__}: {' '.join(str(failure).split())[:80]}", flush=True)
                continue
            found[f"{inputs} → {outputs}, {tile}"] = taken
            speed = 2 * TOKENS * inputs * outputs / taken / 1e9
            print(f"  {tile!s:26}{1000 * taken:8.1f} µs {speed:6.0f} TOP/s", flush=True)


def report_two_at_once(found: dict) -> None:
    """What one pass over two blocks saves of the linear layers of two passes: all that it can save on the GPU, for its
    attention is that of the two, and its other kernels move as much memory."""
    layers = {"bf16": ((DIM, DIM, 6, ""), (DIM, FFN, 1, ", GELU"), (FFN, DIM, 1, "")),
              "int8": ((DIM, 3 * DIM, 1, ""), (DIM, FFN, 1, ""), (FFN, DIM, 1, ""))}  # square ones stay in bf16
    for name, parts in layers.items():
        one, two = (SIZES.num_layers * sum(calls * found[f"{rows} × {inputs} → {outputs}, {name}{also}"]
                                           for inputs, outputs, calls, also in parts) for rows in (TOKENS, 2 * TOKENS))
        found[f"two blocks at once, {name}"] = {"two_passes_ms": 2 * one, "one_pass_ms": two}
        print(f"linear layers of a block, {name}: {one:.2f} ms; of two in one pass {two:.2f} ms, which saves "
              f"{2 * one - two:.2f} ms a block", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here")
    found: dict[str, dict] = {"products": {}, "kernels": {}}
    compare_products(found["products"])
    compare_kernels(found["kernels"])
    compare_linear_tiles(found.setdefault("tiles of linear layers", {}))
    for keys_count in (TOKENS, TOKENS // FRAMES * WINDOW):
        compare_tiles(keys_count, found.setdefault(f"attention to {keys_count}", {}))
    compare_attention(TOKENS // FRAMES * WINDOW, found.setdefault("attention in bfloat16", {}))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
