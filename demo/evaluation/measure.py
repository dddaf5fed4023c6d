"""What the judge and plain statistics say of finished MP4s."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.evaluation.plan import TIMELINE, Film
from demo.judge import APPEARANCE, ATTRIBUTES, MOVING, SHORTEST, WINDOW, Judge
from demo.videos import read_video
from demo.world import CATEGORIES, FPS

TIMES = (5, 30, 60, 240)  # seconds at which films of one prompt are compared
AFTER = 2.0  # seconds after a switch at which the new scene must show
LOOK = 4.0  # seconds after a switch in which the first moment is searched at which it shows
STEP, STEP_MOVING = 2, 4  # frames between two windows of that search
STEADY = 4  # so many windows in a row must show it
AT_ONCE = 8  # films read while one is measured


def measure(films: Sequence[Film], paths: Sequence[Path], arm: str, block: int, judge: Judge,
            workers: int) -> Iterator[dict]:
    """A row of numbers of each film, as JSON takes it. block: latents in a block.

    Each row has the film's own description; `ends` and `read`: the windows of WINDOW frames that end at these frames,
    and each attribute's index read off them; `statistics` of those at TIMES; `switches` and `elsewhere` of timelines.
    """
    for film, video in zip(films, _read_ahead(paths, workers), strict=True):
        yield _measure_one(film, torch.from_numpy(video), arm, block, judge)


def _read_ahead(paths: Sequence[Path], workers: int) -> Iterator[np.ndarray]:
    """The videos, while the next AT_ONCE are being read."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(read_video, path) for path in paths[:AT_ONCE])
        for path in [*paths[AT_ONCE:], *[None] * len(waiting)]:
            video = waiting.popleft().result()
            if path is not None:
                waiting.append(pool.submit(read_video, path))
            yield video


def _measure_one(film: Film, video: Tensor, arm: str, block: int, judge: Judge) -> dict:
    ends = list(range(WINDOW, len(video) + 1, WINDOW))
    windows = video[:ends[-1]].unflatten(0, (-1, WINDOW))
    row = {"arm": arm, "name": film.name, "kind": film.kind, "seed": film.seed, "scenes": film.scenes,
           "captions": film.captions, "starts": film.starts(block), "frames": len(video), "ends": ends,
           "read": {name: value.tolist() for name, value in judge(windows).items()},
           "statistics": {}}
    at = {end for end in ends if end / FPS in TIMES} | {ends[-1]}
    if film.kind == TIMELINE:
        row |= _switches(film, video, block, judge)
    row["statistics"] = {str(end): statistics(video[end - WINDOW:end].to(judge.device)) for end in sorted(at)}
    return row


def statistics(frames: Tensor) -> dict[str, float]:
    """Of frames uint8 [T, H, W, 3], on a scale of 0 … 255: mean, contrast (standard deviation of the luma within a
    frame), saturation (largest less smallest of R, G, B) and sharpness (root of the mean square of the luma's
    Laplacian)."""
    x = frames.float()
    luma = x @ x.new_tensor([0.2126, 0.7152, 0.0722])
    middle = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * middle
    return {"mean": luma.mean().item(), "contrast": luma.flatten(1).std(1).mean().item(),
            "saturation": (x.amax(-1) - x.amin(-1)).mean().item(), "sharpness": laplacian.square().mean().sqrt().item()}


def changes(video: Tensor, device) -> Tensor:
    """Mean absolute difference of each frame [T, H, W, 3] to the one before, 0 … 255; the first has 0."""
    result = [torch.zeros(1)]
    for begin in range(0, len(video) - 1, 256):
        part = video[begin:begin + 257].to(device).float()
        result.append((part[1:] - part[:-1]).abs().mean((1, 2, 3)).cpu())
    return torch.cat(result)


def _switches(film: Film, video: Tensor, block: int, judge: Judge) -> dict:
    """Of each switch what was read before and after, how long each new attribute took, and the largest change from
    one frame to the next within AFTER seconds; and that of all frames outside these."""
    change = changes(video, judge.device)
    starts = film.starts(block)
    after = round(AFTER * FPS)
    calm = torch.ones(len(video), dtype=torch.bool)
    switches = []
    for k, (start, end) in enumerate(pairwise([*starts[1:], len(video)]), 1):
        calm[start:start + after] = False
        settled = min(start + after, end - WINDOW)  # earlier only where a scene is shorter than that
        read = judge(torch.stack([video[max(0, start - WINDOW):][:WINDOW], video[settled:settled + WINDOW]]))
        new = [i for i in range(len(CATEGORIES)) if film.scenes[k][i] != film.scenes[k - 1][i]]
        switches.append({
            "frame": start, "changed": [CATEGORIES[i] for i in new],
            "before": {name: int(read[name][0]) for name in ATTRIBUTES},
            "after": {name: int(read[name][1]) for name in ATTRIBUTES},
            "delay": _delays({CATEGORIES[i]: film.scenes[k][i] for i in new}, video[start:end], judge),
            "change": change[start:start + after].max().item(),
        })
    return {"switches": switches, "elsewhere": change[calm].max().item()}


def _delays(new: dict[str, int], video: Tensor, judge: Judge) -> dict[str, float | None]:
    """Seconds from the start of a scene until each new attribute shows; None where it does not within LOOK.

    Appearance: until the middle of the first of STEADY short windows that show it. Motion and camera: until the first
    frame of a whole window that shows it.
    """
    result = {}
    for names, length, step, steady in ((APPEARANCE, SHORTEST, STEP, STEADY), (MOVING, WINDOW, STEP_MOVING, 1)):
        wanted = {name: value for name, value in new.items() if name in names}
        begins = range(0, min(round(LOOK * FPS), len(video) - length) + 1, step)
        if not wanted or not begins:
            continue
        read = judge(torch.stack([video[b:b + length] for b in begins]), batch=256)
        for name, value in wanted.items():
            right = (read[name] == value).tolist()
            shows = [b for i, b in enumerate(begins) if all(right[i:i + steady]) and i + steady <= len(right)]
            offset = length / 2 if steady > 1 else 0
            result[name] = (shows[0] + offset) / FPS if shows else None
    return result
