"""Drawn clips to train on: random scripts, their captions, and a store of their latents."""

import random

import torch
from torch import Tensor

from demo.captions import as_people_write, caption
from demo.world import FPS, STYLE, Manner, Script, sample, scene_of

NEVER = 1e6  # seconds
BLOCK = 3  # latents
VAGUE, WORDY = 0.04, 0.2  # shares of captions


def first_frame(block: int) -> int:
    """The first frame of a block: the first latent of a video gives one frame, every other one four."""
    return max(0, 4 * BLOCK * block - 3)


def random_script(clips: int, frames: int, generator: torch.Generator, held_out: bool | None = False,
                  switch: float = 0.5) -> Script:
    """Random clips. held_out: which combinations, None for all. switch: the share of clips in which the scene changes,
    at the start of a block."""
    kinds = [held_out] if held_out is not None else [False, True]
    scenes = torch.cat([sample(clips, 2, generator, kind) for kind in kinds])
    scenes = scenes[torch.randperm(len(scenes), generator=generator)[:clips]]
    last = 1 + max(1, (frames + 3) // (4 * BLOCK) - 1)
    block = torch.randint(1, last, (clips,), generator=generator)
    seconds = (4 * BLOCK * block - 3) / FPS
    seconds = torch.where(torch.rand(clips, generator=generator) < switch, seconds, NEVER)
    starts = torch.stack([torch.zeros(clips), seconds], 1)
    style = torch.rand(clips, STYLE, generator=generator)
    return Script(scenes, starts, style, torch.ones(clips, dtype=torch.int64))


def random_manner(clips: int, generator: torch.Generator, device) -> Manner:
    """So that motion and camera are told by what they are, not by what comes with them. Without this a subject that
    drifts was known by its bobbing, two pixels up and down, and not by the scenery that passes; one that did not keep
    its place, before scenery that stood still, was taken for a moving camera; and houses that passed, but were narrower
    than any that had been drawn, for standing still."""
    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(clips, generator=generator) * (high - low) + low).to(device)

    return Manner(tempo=uniform(0.87, 1.15), camera=uniform(0.75, 1.15), bob=uniform(-0.8, 1.2).clamp(min=0),
                  wobble=uniform(-1.5, 2.0).clamp(min=0), stray=uniform(-12, 18).clamp(min=0),
                  fine=uniform(-0.4, 0.65).exp())


def switch_block(script: Script) -> Tensor:
    """The block at which each clip's scene changes [B]; 0 where it does not."""
    seconds = script.starts[:, 1]
    return torch.where(seconds < NEVER, (seconds * FPS + 3) / (4 * BLOCK), 0).round().long()


class Captions:
    """Token ids of captions, padded to one length."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def of(self, scenes: Tensor, rng: random.Random) -> Tensor:
        """scenes [N, 6] → ids int64 [N, length], 0 where there is no token. A caption of its own for each; some leave
        out where it is, some have words in them that mean nothing."""
        texts = [caption(scene_of(scene), rng, VAGUE) for scene in scenes.tolist()]
        return self.ids([as_people_write(text, rng) if rng.random() < WORDY else text for text in texts])

    def ids(self, texts: list[str]) -> Tensor:
        rows = self.tokenizer(texts, add_special_tokens=True, truncation=True, max_length=self.length,
                              padding="max_length", return_tensors="pt")
        return rows.input_ids * rows.attention_mask
