"""What is made: which prompts and timelines, in which ways, in which batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from demo.captions import caption
from demo.evaluation.batch import CLEAR, KEEP, RECACHE
from demo.world import FPS, sample, scene_of
from wan.geometry import FRAMES

PROMPT, TIMELINE = "prompt", "timeline"
SCENE_SECONDS = 12.0  # between two switches of a timeline
DRAWN_SECONDS = 60.0  # of a drawn clip of a prompt: such clips do not change with time


@dataclass(frozen=True)
class Film:
    """A video to make. scenes: six indices in `CHOICES` each. blocks: the block at which each scene begins."""

    name: str
    kind: str
    seed: int
    scenes: list[list[int]]
    captions: list[str]
    blocks: list[int]
    frames: int

    def starts(self, block: int) -> list[int]:
        """First frame of each scene; `block`: latents in a block."""
        return [max(0, block * FRAMES * b - (FRAMES - 1)) for b in self.blocks]


@dataclass(frozen=True)
class Arm:
    """A way to make films. about: it, in a line. overrides: of the config. at_switch: what becomes of the cache. kinds:
    which films."""

    about: str
    overrides: tuple[str, ...] = ()
    at_switch: str = RECACHE
    kinds: tuple[str, ...] = (PROMPT, TIMELINE)


MAIN, DRAWN, EIGHT = "main", "drawn", "8 bits"
ARMS = {
    MAIN: Arm("the model as its config says"),
    KEEP: Arm("a new prompt leaves the K/V cache as it is", at_switch=KEEP, kinds=(TIMELINE,)),
    CLEAR: Arm("a new prompt empties the K/V cache", at_switch=CLEAR, kinds=(TIMELINE,)),
    "no sink": Arm("the first latents leave the attention window like all others", ("model_kwargs.sink_size=0",)),
    "base": Arm("without the LoRA, as the generator was before it", ("lora_ckpt=null",)),
    "relative RoPE": Arm("positions count within the window (use_infinite_attention)",
                         ("model_kwargs.use_infinite_attention=true",), kinds=(PROMPT,)),
    "absolute RoPE": Arm("positions count from the beginning of the film",
                         ("model_kwargs.use_infinite_attention=false",), kinds=(PROMPT,)),
    EIGHT: Arm("with 8 bits (precision=fp8), on a GPU that multiplies them", ("precision=fp8",)),
    DRAWN: Arm("not by the model but drawn by the world itself: what a perfect one would get"),
}
GROUPS = {"main": (MAIN,), "recache": (KEEP, CLEAR), "sink": ("no sink",), "lora": ("base",),
          "rope": ("relative RoPE", "absolute RoPE"), "precision": (EIGHT,), "drawn": (DRAWN,)}
ON_ANY_DEVICE = tuple(name for name in GROUPS if name != "precision")


@dataclass(frozen=True)
class Task:
    """One batch."""

    arm: str
    films: tuple[Film, ...]

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.films[0].name}"

    @property
    def frames(self) -> int:
        """Frames of each film. A drawn prompt is short."""
        frames = self.films[0].frames
        short = self.arm == DRAWN and self.films[0].kind == PROMPT
        return min(frames, round(DRAWN_SECONDS * FPS)) if short else frames


def prompts(count: int, seconds: float, seed: int) -> list[Film]:
    """Held-out scenes, with a caption each."""
    return [_film(f"prompt-{i:03d}", PROMPT, 10_000 * seed + i, [0], round(seconds * FPS)) for i in range(count)]


def timelines(count: int, seconds: float, seed: int, block: int) -> list[Film]:
    """Scenes that follow each other about every SCENE_SECONDS, all of the same length in blocks of `block` latents.

    Of trained combinations: among held-out ones hardly any differ in nothing but colour, or setting, or subject.
    """
    scenes_each = max(2, round(seconds / SCENE_SECONDS))
    blocks = max(1, round(seconds * FPS / (FRAMES * block) / scenes_each))
    starts = [blocks * k for k in range(scenes_each)]
    return [_film(f"timeline-{i:03d}", TIMELINE, 10_000 * seed + 5_000 + i, starts, round(seconds * FPS))
            for i in range(count)]


def _film(name: str, kind: str, seed: int, blocks: list[int], frames: int) -> Film:
    """A film whose scenes, captions and noise come from its seed alone, however many others are made."""
    scenes, = sample(1, len(blocks), torch.Generator().manual_seed(seed), held_out=kind == PROMPT).tolist()
    rng = random.Random(seed)
    return Film(name, kind, seed, scenes, [caption(scene_of(scene), rng) for scene in scenes], blocks, frames)


def tasks(films: Sequence[Film], groups: Sequence[str], batch: int, ablation_prompts: int,
          relative: bool) -> Iterator[Task]:
    """Batches of films of one kind. All but the main arm make only the first prompts, the same for all of them.

    relative: whether the config has relative RoPE; that arm is the main one and is left out.
    """
    same = "relative RoPE" if relative else "absolute RoPE"
    for name in (arm for group in groups for arm in GROUPS[group] if arm != same):
        for kind in ARMS[name].kinds:
            chosen = [film for film in films if film.kind == kind]
            if kind == PROMPT and name not in (MAIN, DRAWN):
                chosen = chosen[:ablation_prompts]
            for begin in range(0, len(chosen), batch):
                yield Task(name, tuple(chosen[begin:begin + batch]))
