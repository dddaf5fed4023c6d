"""What FP8 costs in quality: the same video in full precision and in FP8.

Prints how far the flow in FP8 is from that in full precision at each denoising step, both given the same latents; the
PSNR between the two videos, each made from the same noise by itself and decoded in full precision; and that between the
same latents decoded in full precision and with 8 bits, infinite where the decoder stays as it is. On a CPU the plain
versions, which are slow, stand in for what a GPU computes.
"""

import argparse
import copy
import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_weights import SIZES
from pipeline.engine import Engine
from pipeline.precision import decoder_in_precision, in_precision
from scripts.benchmarking.random_engine import random_engine
from utils.cli import guarded
from utils.config import load_config
from wan import fp8_decoder
from wan.fp8 import to_fp8
from wan.model import CausalWan
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE

PROMPT = "a red ball bounces on the grass"


@dataclass
class Quality:
    flow: dict[float, list[float]]  # timestep → ‖FP8 − full‖ / ‖full‖ of each block
    psnr: list[float]  # dB between the frames of each block
    decoder: list[float]  # dB between those that the two decoders make of each block


class SideBySide(nn.Module):
    """A generator that returns what `full` does, and notes how far from it `fp8` is on the same latents."""

    def __init__(self, full: CausalWan, fp8: CausalWan):
        super().__init__()
        self.full, self.fp8 = full, fp8
        self.config, self.patch_embedding, self.encode_text = full.config, full.patch_embedding, full.encode_text
        self.errors: dict[float, list[Tensor]] = defaultdict(list)

    def cache_type(self, **sizes) -> "SideBySideCache":
        return SideBySideCache([model.cache_type(**sizes) for model in (self.full, self.fp8)])

    def forward(self, latents, t, position, rope, cache, text, want_flow=True) -> Tensor | None:
        flow, other = (model(latents, t, position, rope, one, text, want_flow)
                       for model, one in zip((self.full, self.fp8), cache.caches, strict=True))
        if want_flow:
            self.errors[t].append((other - flow).norm() / flow.norm())
        return flow


class SideBySideCache:
    def __init__(self, caches: list):
        self.caches = caches

    def begin(self, position: int, frames: int) -> None:
        for cache in self.caches:
            cache.begin(position, frames)

    def rewind(self, keep_sink: bool) -> None:
        for cache in self.caches:
            cache.rewind(keep_sink)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of frames whose values are those of uint8; infinite where they are the same."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def measure(engine: Engine, latents: int, prompt: str) -> Quality:
    """Of an engine in full precision, over `latents` latents."""

    def session_of(generator: nn.Module):
        one = copy.copy(engine)
        one.generator = generator
        one.config = dataclasses.replace(engine.config, cuda_graphs=False)  # which know nothing of two side by side
        session = one.session()
        session.set_prompt(prompt)
        return session

    full, device = engine.generator.to(engine.device), engine.device
    model = copy.deepcopy(full)
    fp8 = to_fp8(model, device) if device.type == "cpu" else in_precision(model, "fp8", device)
    both = SideBySide(full, fp8)
    blocks = range(-(-latents // engine.config.num_frame_per_block))
    session = session_of(both)
    made = [session.step_latents() for _ in blocks]
    flow = {t: torch.stack(errors).tolist() for t, errors in both.errors.items()}
    one, other = session_of(full), session_of(fp8)
    videos = [psnr(one.step(), other.step()) for _ in blocks]
    streams = [decoder.stream() for decoder in (engine.decoder, _with_8_bits(engine))]
    return Quality(flow, videos, [psnr(*(_pixels(stream, block) for stream in streams)) for block in made])


@torch.inference_mode()
def _pixels(stream: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    return stream(latents).float().mul(127.5).add(127.5).round()


def _with_8_bits(engine: Engine) -> WanVAE | TinyDecoder:
    """The engine's decoder; on a CPU with 8 bits wherever some GPU might."""
    decoder = copy.deepcopy(engine.decoder)
    if engine.device.type == "cpu" and isinstance(decoder, WanVAE):
        return fp8_decoder.to_fp8(decoder, engine.device, wanted=lambda conv, device: True)
    return decoder_in_precision(decoder, "fp8", engine.device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config: seed=1 height=240")
    parser.add_argument("--latents", type=int, default=24, metavar="N", help="length of the video; whole blocks")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    parser.add_argument("--random", choices=SIZES, metavar="SIZE", help="random weights, toy or full: no checkpoint")
    args = parser.parse_intermixed_args(argv)
    config = dataclasses.replace(load_config(args.config, args.overrides), precision="full")
    engine = random_engine(config, args.random) if args.random else Engine.from_config(config)
    quality = measure(engine, args.latents, args.prompt)
    print("flow, error relative to full precision:")
    for t, errors in quality.flow.items():
        print(f"  t = {t:6.1f}: mean {mean(errors):.4f}, last block {errors[-1]:.4f}")
    for what, values in (("PSNR of each block", quality.psnr), ("PSNR of the decoder alone", quality.decoder)):
        print(f"{what}, dB: " + " ".join(f"{value:.1f}" for value in values), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
