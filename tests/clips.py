"""Latents of drawn clips. Unlike what a generator makes they are the same on any processor, but for rounding."""

import random

import torch
from torch import Tensor

from demo.captions import caption
from demo.training.clips import random_script
from demo.world import draw, scene_of
from tests.conftest import REPOSITORY
from tests.diffusers_vae import DiffusersVAE, empty
from utils.checkpoint import fill, read_folder, read_json


@torch.inference_mode()
def encoded_clip(latents: int, seed: int) -> tuple[str, Tensor]:
    """A drawn clip of one scene: its caption, and latents [1, F, 16, h, w] of the small model's VAE."""
    folder = REPOSITORY / "demo/checkpoint/vae"
    vae = DiffusersVAE(fill(empty(read_json(folder / "config.json")), read_folder(folder), str(folder), torch.float32))
    frames = 4 * latents - 3
    script = random_script(1, frames, torch.Generator().manual_seed(seed), switch=0)
    return (caption(scene_of(script.scenes[0, 0].tolist()), random.Random(seed)),
            vae.encode(draw(script, frames).float() / 127.5 - 1))
