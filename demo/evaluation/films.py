"""Makes the films of a batch: MP4 files, by the model or by the world itself."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demo.canvas import HEIGHT, WIDTH
from demo.evaluation.batch import BatchSession
from demo.evaluation.plan import ARMS, Film
from demo.world import FPS, STYLE, Script, draw
from pipeline.engine import Engine
from utils.video import Mp4Writer

DRAWN_TOGETHER = 64  # frames of each clip that are handed on at once


class Reels:
    """MP4 files of a batch, written side by side.

        with Reels(paths) as reels:
            reels.write(frames)      # uint8 [B, T, H, W, 3]
    """

    def __init__(self, paths: Sequence[Path], crf: int, workers: int):
        self.pool = ThreadPoolExecutor(workers)
        self.writers = list(self.pool.map(
            lambda path: Mp4Writer(path, width=WIDTH, height=HEIGHT, fps=FPS, crf=crf), paths))

    def write(self, frames: Tensor) -> None:
        for writer, one in zip(self.writers, frames, strict=True):
            writer.write(one)

    def __enter__(self) -> "Reels":
        return self

    def __exit__(self, kind, error, trace) -> None:
        list(self.pool.map(Mp4Writer.close, self.writers))
        self.pool.shutdown()


def generated(engine: Engine, films: Sequence[Film], arm: str) -> Iterator[Tensor]:
    """The films' frames, block by block, uint8 [B, T, H, W, 3]."""
    session = BatchSession(engine, [film.seed for film in films], ARMS[arm].at_switch)
    scene, made = -1, 0
    while made < films[0].frames:
        if session.block in films[0].blocks:
            scene += 1
            session.set_prompts([film.captions[scene] for film in films])
        frames = session.step()[:, :films[0].frames - made]
        made += frames.shape[1]
        yield frames


def drawn(films: Sequence[Film], frames: int, block: int, device: torch.device | str) -> Iterator[Tensor]:
    """So many frames of the same films as the world draws them, uint8 [B, T, H, W, 3]."""
    style = torch.stack([torch.rand(STYLE, generator=torch.Generator().manual_seed(film.seed)) for film in films])
    starts = torch.tensor([film.starts(block) for film in films]) / FPS
    script = Script(torch.tensor([film.scenes for film in films]), starts, style,
                    torch.ones(len(films), dtype=torch.int64)).to(device)
    clips = [draw(script[i:i + 1], frames, 512).cpu() for i in range(len(films))]
    for parts in zip(*(clip[0].split(DRAWN_TOGETHER) for clip in clips), strict=True):
        yield torch.stack(parts).permute(0, 1, 3, 4, 2).contiguous()


@dataclass(frozen=True)
class Studio:
    """Where and how films are written."""

    folder: Path
    crf: int
    workers: int
    progress: Callable[[str], None]

    def path(self, arm: str, film: Film) -> Path:
        return self.folder / "videos" / arm.replace(" ", "-") / f"{film.name}.mp4"

    def shoot(self, arm: str, films: Sequence[Film], frames: Iterator[Tensor]) -> list[Path]:
        """Writes all frames to the films' files; those made before an interruption are kept."""
        paths = [self.path(arm, film) for film in films]
        made, said = 0, 0
        with Reels(paths, self.crf, self.workers) as reels:
            for block in frames:
                reels.write(block)
                made += block.shape[1]
                if made - said >= 20 * FPS:
                    self.progress(f"{len(films)} films, {made / FPS:.0f} of {films[0].frames / FPS:.0f} s")
                    said = made
        return paths
