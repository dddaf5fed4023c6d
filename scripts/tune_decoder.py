"""Times ways to do what Wan's decoder is made of, on this GPU and at 480×832: its convolutions, its attention, and the
decoding of a block of three latents as a whole.

The fastest way of a convolution belongs into HOPPER of wan/kernels/conv.py, the fastest tile into TILE of
wan/kernels/triton_conv.py, the number of up-blocks into TOGETHER of wan/vae.py. What is faster with 8 bits belongs into
HOPPER of wan/fp8_decoder.py, its tiles into WIDE, NARROW and FEW of wan/kernels/triton_fp8_conv.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_weights import SIZES, randomise
from scripts.benchmarking.clock import draw, error, milliseconds
from utils.checkpoint import fill
from wan import fp8_decoder, vae
from wan.attention import one_head
from wan.kernels import conv, fp8_conv, norm_silu
from wan.kernels.hopper import is_hopper
from wan.sizes import from_sizes
from wan.vae_decoder import VAEConfig, VAEDecoder

# Frames with the two of the past, rows, columns, channels and channels of the result: what a latent takes most time in.
CONVOLUTIONS = ((6, 480, 832, 96, 96), (6, 480, 832, 96, 3), (6, 240, 416, 192, 192))
TILES = ((2, 128, 32, 8, 4), (2, 128, 32, 8, 6), (2, 128, 32, 8, 3), (1, 128, 32, 4, 4), (1, 128, 32, 4, 5),
         (2, 64, 32, 4, 4), (2, 64, 32, 4, 5), (1, 256, 32, 8, 4))
# What a residual block's convolutions see, with 8 bits, too: of a latent, or of three at once where frames are small.
RESIDUAL = ((6, 480, 832, 96, 96), (6, 240, 416, 192, 192), (4, 120, 208, 384, 384), (4, 120, 208, 192, 384),
            (5, 60, 104, 384, 384), (3, 60, 104, 384, 384))
TILES_OF_FEW = ((256, 128, 0, 128, 32, 8, 4), (256, 128, 0, 128, 32, 8, 3), (256, 128, 0, 64, 32, 8, 6),
                (256, 128, 0, 128, 0, 8, 4), (128, 128, 0, 128, 32, 4, 3))
TILES_OF_MANY = ((128, 128, 64, 64, 0, 4, 5), (128, 128, 64, 64, 0, 4, 4), (128, 128, 0, 128, 0, 4, 3),
                 (256, 128, 64, 128, 0, 8, 3), (256, 128, 0, 128, 0, 8, 4))
FULL = (96, 96, 3, 3, 3)  # the weight's shape at full resolution
Convolve = Callable[[], Tensor]


def padded(x: Tensor, weight: Tensor, inputs: int) -> Convolve:
    """cuDNN with 128 channels of the result, and `inputs` of x."""
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, inputs - x.shape[-1], 0, 128 - len(weight)))
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    x = F.pad(x, (0, inputs - x.shape[-1]))
    return lambda: conv.conv3d_plain(x, weight, None)


def pairs_of_frames(x: Tensor, weight: Tensor) -> Convolve:
    """cuDNN over images of four frames in each other's channels, for two frames of the result. Putting them there is
    left out: the pass before could write them so."""
    images = torch.cat([torch.cat([x[:, i + j] for j in range(4)], -1) for i in range(0, x.shape[1] - 2, 2)])
    both = torch.cat([F.pad(weight, (0, 0, 0, 0, 0, 1)), F.pad(weight, (0, 0, 0, 0, 1, 0))])
    both = both.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(images.permute(0, 3, 1, 2), both, padding=1)


def ways_of(x: Tensor, weight: Tensor) -> dict[str, Convolve]:
    channels, results = x.shape[-1], len(weight)
    ways = {"cuDNN": lambda: conv.conv3d_plain(x, weight, None)}
    if results % 8 == 0:
        ways |= {"pairs": lambda: conv.conv3d_of_pairs(x, weight, None),
                 "pairs of frames": pairs_of_frames(x, weight)}
    if results <= 4:
        ways["Triton, to few"] = lambda: conv.conv3d_to_few(x, weight, None)
    if channels < 128:
        ways |= {"128 results": padded(x, weight, channels), "128 channels": padded(x, weight, 128)}
    return ways


def measure(call: Convolve, exact: Tensor) -> dict[str, float]:
    result = call()
    return {"off": error(result, exact) if result.shape == exact.shape else None, "ms": milliseconds(call, 6)}


def compare_ways(x: Tensor, weight: Tensor) -> dict[str, dict]:
    """What each way of a convolution takes, and how far it is off."""
    from wan.kernels import triton_conv  # not before: Triton needs a GPU driver

    exact, found = conv.conv3d_plain(x.float(), weight.float(), None), {}
    tflop = 2 * exact[..., 0].numel() * weight.numel() / 1e12

    def show(way: str, call: Convolve) -> None:
        try:
            found[way] = told = measure(call, exact)
        except Exception as failure:  # what this GPU can't do; neither cuDNN nor Triton has one type for it
            print(f"  {way:28}{type(failure).__name__}: {' '.join(str(failure).split())[:60]}", flush=True)
            return
        off = "" if told["off"] is None else f", off by {told['off']:.4f}"
        print(f"  {way:28}{told['ms']:8.3f} ms {1000 * tflop / told['ms']:6.0f} TFLOP/s{off}", flush=True)

    for way, call in ways_of(x, weight).items():
        show(way, call)
    torch.backends.cudnn.benchmark = True  # which tries algorithms: a search that a video would not repeat bit for bit
    show("cuDNN, searched", lambda: conv.conv3d_plain(x, weight, None))
    torch.backends.cudnn.benchmark = False
    if len(weight) <= 128:
        for tile in TILES:
            triton_conv.TILE = tile
            show(f"Triton {tile}", lambda: conv.conv3d_triton(x, weight, None))
        triton_conv.TILE = min(TILES, key=lambda tile: found.get(f"Triton {tile}", {"ms": float("inf")})["ms"])
    return found


def compare_convolutions(found: dict) -> None:
    for frames, height, width, channels, results in reversed(CONVOLUTIONS):  # the first one's tile stays
        name = f"{channels} → {results} on {frames}×{height}×{width}"
        print(name, flush=True)
        weight = draw(results, channels, 3, 3, 3) / (27 * channels) ** 0.5
        found[name] = compare_ways(draw(1, frames, height, width, channels),
                                   weight.contiguous(memory_format=torch.channels_last_3d))


def times_by_bits(frames: int, height: int, width: int, channels: int, results: int) -> dict[str, float]:
    """Milliseconds of a residual block's convolution with 16 bits and with 8, its bias and what it is added to
    included, and of the pass before it."""
    from wan.kernels import triton_fp8_conv

    weight = draw(results, channels, 3, 3, 3) / (27 * channels) ** 0.5
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    x, gamma, bias = draw(1, frames, height, width, channels), draw(channels), draw(results)
    skip, steps = draw(1, frames - 2, height, width, results), fp8_conv.steps_for(gamma)
    full, short = torch.empty_like(x), fp8_conv.room(x, frames)
    found = {"norm": milliseconds(lambda: norm_silu(x, gamma, None, full)),
             "norm, 8 bits": milliseconds(lambda: fp8_conv.norm_silu_e4m3(x, gamma, None, steps, short)),
             "16 bits": milliseconds(lambda: conv.conv3d(full, weight, bias, skip), 6)}
    for what, taken in found.items():
        print(f"  {what:28}{taken:8.3f} ms")
    given = (short, 0, frames, fp8_conv.filters_of(weight, steps), bias, skip)
    call = lambda: fp8_conv.conv3d_e4m3(*given, torch.bfloat16)
    exact, choose = fp8_conv.conv3d_e4m3_plain(*given, torch.float32), triton_fp8_conv._tile
    for tile in TILES_OF_FEW if channels < 128 else TILES_OF_MANY:
        triton_fp8_conv._tile = lambda *sizes, tile=tile: triton_fp8_conv.Tile(*tile)
        try:
            off, taken = error(call(), exact), milliseconds(call, 6)
        except Exception as failure:  # a tile that this GPU has no room for
            print(f"  {tile!s:34}{type(failure).__name__}: {' '.join(str(failure).split())[:60]}", flush=True)
            continue
        found[f"8 bits, {tile}"] = taken
        print(f"  {tile!s:34}{taken:8.3f} ms, off by {off:.4f}", flush=True)
    triton_fp8_conv._tile = choose
    return found


def compare_bits(found: dict) -> None:
    for sizes in RESIDUAL:
        frames, height, width, channels, results = sizes
        name = f"8 bits, {channels} → {results} on {frames}×{height}×{width}"
        print(name, flush=True)
        found[name] = times_by_bits(*sizes)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its scores in memory."""
    scores = torch.bmm(q[:, 0], k[:, 0].transpose(1, 2), out_dtype=torch.float32) * q.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(-1).to(v.dtype), v[:, 0])[:, None]


def compare_attention(found: dict) -> None:
    q, k, v = draw(1, 1, 60 * 104, 3 * 384).chunk(3, -1)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    ours = lambda q, k, v: one_head(q[:, 0], k[:, 0], v[:, 0])[:, None]
    for way, call in {"as PyTorch chooses": F.scaled_dot_product_attention, "explicit": explicit, "ours": ours}.items():
        taken, off = milliseconds(lambda call=call: call(q, k, v)), error(call(q, k, v), exact)
        found.setdefault("attention", {})[way] = {"ms": taken, "off": off}
        print(f"attention of a latent, {way:20}{taken:8.3f} ms, off by {off:.4f}", flush=True)


def compare_decoders(found: dict) -> None:
    """Of a steady block of three latents."""
    with torch.device("meta"):
        model = VAEDecoder(from_sizes(VAEConfig, SIZES["full"].vae))
    weights = randomise(model, "cuda", torch.Generator("cuda").manual_seed(0))
    decoder = vae.WanVAE(fill(model, weights, "random", torch.bfloat16)).to(torch.device("cuda"))
    latents, first = draw(1, 3, 16, 60, 104), None
    others = {shape: way for shape, way in conv.HOPPER.items() if shape != FULL}
    for name, way in (("cuDNN at full resolution", None), ("pairs at full resolution", conv.conv3d_of_pairs),
                      ("Triton at full resolution", conv.conv3d_triton), ("8 bits", conv.conv3d_triton)):
        if name == "8 bits":
            if not is_hopper(torch.device("cuda")):
                continue
            decoder = fp8_decoder.to_fp8(decoder, torch.device("cuda"))
        for together in (0, 1, 2):
            conv.HOPPER = others if way is None else {**others, FULL: way}
            vae.TOGETHER = together
            torch.cuda.empty_cache()
            stream = decoder.stream()
            stream(latents)
            frames = stream(latents)
            first = frames if first is None else first
            torch.cuda.reset_peak_memory_stats()
            taken = milliseconds(lambda stream=stream: stream(latents), 2)
            peak = torch.cuda.max_memory_allocated() / 2**30
            off = error(frames, first)
            told = {"ms": taken, "peak_gib": peak, "off": off}
            found.setdefault("decoder", {})[f"{name}, {together}"] = told
            print(f"a block, {name}, {together} up-blocks together: {taken:.2f} ms, peak {peak:.2f} GiB, "
                  f"{off:.4f} from the first", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here")
    found: dict[str, dict] = {}
    for compare in (compare_convolutions, compare_bits, compare_attention, compare_decoders):
        try:
            compare(found)
        except Exception as failure:  # of one way; what was found of the others counts all the same
            print(f"{compare.__name__} stopped: {type(failure).__name__}: {failure}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
