"""Many videos made as one batch, each as a Session of its own makes it."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.engine import Engine
from pipeline.noise import NoiseSource
from pipeline.session import Session
from utils.device import download, upload
from wan.kernels import norm_silu
from wan.vae import WanStream, WanVAE

RECACHE, KEEP, CLEAR = "recache", "keep", "clear"  # what becomes of the K/V cache at a prompt switch


class StackedNoise:
    """The noise of several videos, float32 [B, F, C, h, w]; each gets the numbers that it gets alone."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device):
        self.sources = [NoiseSource(seed, shape) for seed in seeds]
        self.batch, self.device = len(self.sources), device
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # NumPy draws without holding the interpreter

    def start(self, block: int) -> Tensor:
        return self._stack(lambda source: source.start(block))

    def renoise(self, block: int, step: int) -> Tensor:
        return self._stack(lambda source: source.renoise(block, step))

    def _stack(self, draw: Callable[[NoiseSource], Tensor]) -> Tensor:
        return upload(torch.cat(list(self._pool.map(draw, self.sources))), self.device)


class BatchStream(WanStream):
    """The decoder's stream, which normalises all videos of a batch by one kernel instead of one each."""

    def _causal(self, conv: nn.Conv3d, x: Tensor, norm: nn.Module | None = None, bias_before: Tensor | None = None,
                add_own_bias: bool = True, skip: Tensor | None = None) -> Tensor:
        if norm is not None:
            x = x.contiguous()
            normed = torch.empty_like(x)
            norm_silu(x.flatten(0, 1)[None], norm.gamma.flatten(), bias_before, out=normed.flatten(0, 1)[None])
            x = normed
        return super()._causal(conv, x, add_own_bias=add_own_bias, skip=skip)


class BatchSession(Session):
    """B videos in the making. They have a prompt each, and all switch at the same blocks.

        session = BatchSession(engine, seeds=[1, 2])
        session.set_prompts(["a red ball", "a blue car"])
        frames = session.step()          # uint8 [B, T, H, W, 3] on the host

    at_switch: RECACHE is what a Session does. For comparison, KEEP leaves the K/V that were made under the old prompts,
    and CLEAR goes on with an empty cache.
    """

    def __init__(self, engine: Engine, seeds: Sequence[int], at_switch: str = RECACHE):
        if at_switch not in (RECACHE, KEEP, CLEAR):
            raise ValueError(f"at_switch={at_switch!r} is not one of {RECACHE}, {KEEP}, {CLEAR}")
        one = engine.session(seeds[0])

        def encode(prompts: tuple[str, ...]) -> Tensor:
            embeds = [engine.encode(prompt) for prompt in prompts]
            longest = max(e.shape[1] for e in embeds)  # the generator pads with zeros too
            return torch.cat([F.pad(e, (0, 0, 0, longest - e.shape[1])) for e in embeds])

        decode = BatchStream(engine.decoder) if isinstance(engine.decoder, WanVAE) else one.decode
        super().__init__(engine.config, engine.generator, encode, decode,
                         StackedNoise(seeds, one.noise.shape, one.device))
        self.at_switch = at_switch

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """The prompts from the next block on. Raises ValueError where some change and others do not: a video made
        alone would not be re-cached then."""
        if len(prompts) != self.noise.batch:
            raise ValueError(f"{len(prompts)} prompts for {self.noise.batch} videos")
        if self.prompt is not None:
            same = [old == new for old, new in zip(self.prompt, prompts, strict=True)]
            if any(same) and not all(same):
                raise ValueError(f"the prompts of {sum(same)} of {len(same)} videos stay; all must switch together")
        self.set_prompt(tuple(prompts), KEEP if self.at_switch == KEEP else RECACHE)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Makes the next block of all videos. Returns their frames, uint8 [B, T, H, W, 3] on the host."""
        frames = self.decode(self.step_latents()).float().mul(127.5).add(127.5).round().to(torch.uint8)
        self.watch.read()
        return download(frames.permute(0, 1, 3, 4, 2).contiguous())

    def _recache(self, global_sink: bool) -> None:
        if self.at_switch == CLEAR:
            self.cache.rewind(keep_sink=False)
        else:
            super()._recache(global_sink)
