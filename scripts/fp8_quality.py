"""What 8 bits cost: how far `precision=fp8` is from full precision, given the same latents and the same past.

Prints the error of the generator's flow at each denoising step and that of a whole block's clean latents, relative to
full precision, and the PSNR between the frames that the two decoders make of the same latents, infinite where the
decoder stays as it is. On a CPU the plain versions, which are slow, stand in for what a GPU computes.

Two videos that are each made by themselves are not compared: one number rounded the other way turns many after it, so
how far apart they are is chance, and differs between processors. What 8 bits do to how videos look is measured by
`python -m demo.evaluate --only main precision`.
"""

import argparse
import copy
import dataclasses
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_weights import SIZES
from pipeline.engine import Engine
from pipeline.precision import decoder_in_precision, in_precision
from pipeline.sampler import denoise_block
from pipeline.session import Session
from scripts.benchmarking.random_engine import random_engine
from utils.cli import guarded
from utils.config import load_config
from utils.device import upload
from wan import fp8_decoder
from wan.fp8 import to_fp8
from wan.model import CausalWan
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE

PROMPT = "a red ball bounces on the grass"


@dataclass
class Errors:
    """Of a generator, ‖8 bits − full‖ / ‖full‖."""

    flow: dict[float, list[float]]  # timestep → of the flow in each block
    block: list[float]  # of each block's clean latents, made from the same noise
    latents: Tensor  # float32 [1, N, 16, h, w]: those that the past was made of

    def flows(self) -> list[float]:
        """Of all timesteps and blocks."""
        return [error for errors in self.flow.values() for error in errors]


def generator_in_8_bits(engine: Engine) -> CausalWan:
    """A copy of the engine's generator, which is in full precision."""
    model = copy.deepcopy(engine.generator)
    return to_fp8(model, engine.device) if engine.device.type == "cpu" else in_precision(model, "fp8", engine.device)


def decoder_in_8_bits(engine: Engine) -> WanVAE | TinyDecoder:
    """A copy of the engine's decoder; on a CPU with 8 bits wherever some GPU might have them."""
    decoder = copy.deepcopy(engine.decoder)
    if engine.device.type == "cpu" and isinstance(decoder, WanVAE):
        return fp8_decoder.to_fp8(decoder, engine.device, wanted=lambda conv, device: True)
    return decoder_in_precision(decoder, "fp8", engine.device)


@torch.inference_mode()
def generator_errors(engine: Engine, eight: CausalWan, blocks: int, prompt: str,
                     past: Tensor | None = None) -> Errors:
    """How far `eight` is from the engine's generator in each of `blocks` blocks, given the same latents and past.

    past: clean latents [1, N, 16, h, w] that the caches are filled from; without it those that full precision makes.
    """
    sessions = [_session(engine, generator) for generator in (engine.generator, eight)]
    embeds = upload(engine.encode(prompt), engine.device)
    texts = [session.generator.encode_text(embeds) for session in sessions]
    size, noise, steps = engine.config.num_frame_per_block, sessions[0].noise, sessions[0].steps
    errors = Errors(defaultdict(list), [], torch.empty(0, device=engine.device))
    position, made = 0, []

    def run(which: int, x: Tensor, t: float, want_flow: bool = True) -> Tensor:
        one = sessions[which]
        return one.generator(x, t, position, one.rope, one.cache, texts[which], want_flow)

    def both(x: Tensor, t: float) -> Tensor:
        flow = run(0, x, t)
        errors.flow[t].append(_relative(run(1, x, t), flow))
        return flow

    def eight_alone(x: Tensor, t: float) -> Tensor:
        return run(1, x, t)

    for block in range(blocks):
        position = block * size
        for session in sessions:
            session.cache.begin(position, size)
        renoise = partial(noise.renoise, block)
        clean, other = (denoise_block(flow, noise.start(block), steps, renoise) for flow in (both, eight_alone))
        errors.block.append(_relative(other, clean))
        made.append(clean if past is None else past[:, position : position + size])
        for which in range(len(sessions)):
            run(which, made[-1], engine.config.context_noise, want_flow=False)
    errors.latents = torch.cat(made, 1)
    return errors


def _session(engine: Engine, generator: CausalWan) -> Session:
    one = copy.copy(engine)
    one.generator = generator
    return one.session()


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of frames whose values are those of uint8; infinite where they are the same."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


@torch.inference_mode()
def decoder_psnr(full: WanVAE | TinyDecoder, eight: WanVAE | TinyDecoder, latents: Tensor, size: int) -> list[float]:
    """dB between the frames that two decoders make of the same latents, for each block of `size` of them."""
    streams = full.stream(), eight.stream()
    return [psnr(*(stream(block).float().mul(127.5).add(127.5).round() for stream in streams))
            for block in latents.split(size, dim=1)]


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
    size = config.num_frame_per_block
    errors = generator_errors(engine, generator_in_8_bits(engine), -(-args.latents // size), args.prompt)
    print("flow, error relative to full precision:")
    for t, of_blocks in errors.flow.items():
        print(f"  t = {t:6.1f}: mean {mean(of_blocks):.4f}, worst {max(of_blocks):.4f}, last block {of_blocks[-1]:.4f}")
    print("clean latents of each block, error: " + " ".join(f"{value:.3f}" for value in errors.block))
    decoded = decoder_psnr(engine.decoder, decoder_in_8_bits(engine), errors.latents, size)
    print("decoder, dB of each block: " + " ".join(f"{value:.1f}" for value in decoded), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
