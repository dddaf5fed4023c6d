"""One video, made as a front-end makes it, and what it took."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.engine import Engine
from pipeline.timeline import Timeline
from utils.report import peak_gpu, resident
from utils.video import Mp4Writer
from wan.geometry import frames_of, whole_blocks

REFERENCE = 30  # the latent that later ones are compared with
NEAR = 5  # blocks from there on that the reference is the median of
LAST = 10  # blocks at the end


@dataclass
class Video:
    """Times in ms. Medians are over steady blocks, those made once the window was full."""

    name: str
    latents: int
    frames: int
    stages: dict[str, float]  # medians of denoise, clean pass, re-cache, decode, encode
    block: float  # median of the wall clock of a block
    frames_per_second: float  # from the start to the closed file
    first_frame: float  # from an engine to the first frames on the host
    switch_to_frame: float | None  # from set_prompt to the first frames under the new prompt on the host
    peak_gpu_gib: float
    host_gib: float  # at the end of the video
    host_growth_mib: float  # since the window was full
    flatness: float | None  # the last blocks' time to that at latent 30
    peak_gpu_growth_mib: float | None  # since latent 30
    latents_of_block: int
    block_series: list[float] = field(repr=False)  # of every block


def flatness(walls: Sequence[float], block: int) -> float | None:
    """The median of the last blocks' times to the median of those from latent 30 on; None for a video that is too
    short for both. walls: of every block; block: latents in one."""
    start = REFERENCE // block
    if len(walls) < start + NEAR + LAST:
        return None
    return statistics.median(walls[-LAST:]) / statistics.median(walls[start:start + NEAR])


def timeline(engine: Engine, latents: int, prompts: int = 1) -> Timeline:
    """`latents` latents, rounded up to whole blocks, with so many prompts, each for as long as the others."""
    block = engine.config.num_frame_per_block
    return Timeline.evenly(["a" * (i + 1) for i in range(prompts)], block=block,
                           frames=frames_of(whole_blocks(latents, block)))


def make(engine: Engine, name: str, timeline: Timeline, folder: Path) -> Video:
    """Makes one video, from noise to an MP4 in `folder`, and times it."""
    config = engine.config
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    start = time.perf_counter()
    session = engine.session(seed=0)
    steady = min((config.window or 0) // config.num_frame_per_block + 1, len(timeline) - 1)
    walls, peaks, switches, previous, host, first = [], [], [], None, 0, 0.0
    with Mp4Writer(folder / f"{name}.mp4", width=config.width, height=config.height, fps=config.fps,
                   crf=config.crf) as video:
        for prompt in timeline:
            began = time.perf_counter()
            session.set_prompt(prompt)
            frames = session.step()
            walls.append(time.perf_counter() - began)
            peaks.append(peak_gpu(engine.device))
            first = first or time.perf_counter() - start
            if previous not in (None, prompt):
                switches.append(walls[-1])
            previous = prompt
            video.write(frames)
            host = resident() if len(walls) == steady else host
    total = time.perf_counter() - start

    def ms(seconds: Sequence[float]) -> float:
        return round(1000 * statistics.median(seconds), 2)

    runs = session.watch.read()
    from_block = {"denoise": steady, "decode": steady, "clean pass": steady - 1, "re-cache": 0}
    stages = {stage: ms(runs[stage][since:]) for stage, since in from_block.items() if runs.get(stage, [])[since:]}
    stages["encode"] = round(1000 * video.seconds / len(walls), 2)
    flat, reference = flatness(walls, timeline.block), REFERENCE // timeline.block
    return Video(
        name=name, latents=timeline.latents, frames=timeline.frames, stages=stages, block=ms(walls[steady:]),
        frames_per_second=round(timeline.frames / total, 2), first_frame=round(1000 * first, 2),
        switch_to_frame=ms(switches) if switches else None, peak_gpu_gib=round(peaks[-1] / 2**30, 3),
        host_gib=round(resident() / 2**30, 3), host_growth_mib=round((resident() - host) / 2**20, 1),
        flatness=None if flat is None else round(flat, 4),
        peak_gpu_growth_mib=None if flat is None else round((peaks[-1] - peaks[reference]) / 2**20, 1),
        latents_of_block=timeline.block, block_series=[round(1000 * wall, 2) for wall in walls],
    )
