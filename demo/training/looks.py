"""What a stage of the generator's training has come to: short videos of held-out scenes, read by the judge, as a line
of numbers and a contact sheet."""

import random
from pathlib import Path

import torch
from torch import Tensor

from demo.captions import caption
from demo.evaluation.sheets import sheet
from demo.judge import ATTRIBUTES, COUNT, WINDOW, Judge
from demo.training import vae as vaes
from demo.training.forcing import load_student
from demo.training.generator import PHASES
from demo.training.rollout import Videos, embed
from demo.training.teacher import Teacher
from demo.world import CATEGORIES, FPS, sample, scene_of

SHOWN = (0, 20, 40, 80)  # frames of each video in the contact sheet
ROWS = 12


@torch.no_grad()
def look(folder: Path, stage: str, device: str, videos: int = 128, blocks: int = 7, seed: int = 11) -> dict[str, float]:
    """Writes FOLDER/looks/STAGE.png; returns, and prints, the share of videos whose end shows each attribute right.

    Up to stage 3 the videos are made by the many steps of the guided flow, later by the four steps of the student.
    """
    torch.manual_seed(seed)
    scenes, rng = sample(videos, 1, torch.Generator().manual_seed(seed), held_out=True)[:, 0], random.Random(seed)
    captions = [caption(scene_of(scene), rng) for scene in scenes.tolist()]
    model, text, words = load_student(folder, stage, device)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    made = Videos(model.to(dtype).requires_grad_(False), embed(text, words.ids(captions).to(device)))
    teacher = Teacher(made.fast, embed(text, words.ids([""]).to(device)), videos, dtype)
    latents = []
    for _ in range(blocks):
        made.begin()
        noise = torch.randn_like(made.latest)
        if stage in PHASES:
            teacher.see(made.past(), made.embeds)
            x0 = teacher.endpoint(noise, 1.0)
        else:
            x0 = made.denoise()
        made.remember(x0)
        made.finish(x0)
        latents.append(x0)
    frames = _decode(folder, torch.cat(latents, 1), device)
    read = Judge.load(device=device)(frames[:, -WINDOW:])
    right = {name: read[name] == scenes[:, i] for i, name in enumerate(CATEGORIES)} | {COUNT: read[COUNT] == 1}
    shares = {name: round(right[name].float().mean().item(), 3) for name in ATTRIBUTES}
    print(f"{stage}: {videos} held-out videos, right after {frames.shape[1] / FPS:.1f} s: "
          + "  ".join(f"{name} {value:.2f}" for name, value in shares.items()), flush=True)
    shown = [i for i in SHOWN if i < frames.shape[1]]
    (folder / "looks").mkdir(exist_ok=True)
    sheet([[frames[row, i].cpu().numpy() for i in shown] for row in range(min(ROWS, videos))],
          [f"{(i + 1) / FPS:.1f} s" for i in shown], [[text] for text in captions[:ROWS]],
          folder / f"looks/{stage}.png")
    return shares


def _decode(folder: Path, latents: Tensor, device: str) -> Tensor:
    """Frames uint8 [B, T, H, W, 3] of latents [B, F, 16, h, w]."""
    vae, mean, std = vaes.load(folder, device)
    frames = []
    for part in latents.split(8):
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            pixels = vaes.decode(vae, (part * std + mean).transpose(1, 2)).float()
        frames.append(pixels.clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1))
    return torch.cat(frames)
