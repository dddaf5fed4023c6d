"""Whether the GPU is kept busy: the share of time in which a kernel runs, and that the host never waits for it."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.engine import Engine
from pipeline.session import Session
from utils.video import Mp4Writer

LONG_GAP = 0.1  # ms without a kernel that are more than the step from one to the next
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a Chrome trace
TOP = 25  # kernels that are listed


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def long_gaps(intervals: Iterable[tuple[float, float]], longer_than: float) -> list[float]:
    """The lengths of the pauses longer than that between intervals (start, end)."""
    gaps, reached = [], None
    for start, end in sorted(intervals):
        if reached is not None and start - reached > longer_than:
            gaps.append(start - reached)
        reached = max(end, reached or end)
    return gaps


def summarise(events: list[dict], wall: float, blocks: int) -> dict[str, Any] | None:
    """The share of `wall` seconds in which a kernel or a copy ran, and which took most. events: of a Chrome trace,
    times in µs, of `blocks` blocks. None where no kernel is among them."""
    events = [event for event in events if event.get("cat") in ON_GPU]
    if not events:
        return None
    intervals = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    busy, gaps = union(intervals) / 1e6, long_gaps(intervals, 1000 * LONG_GAP)
    taken: dict[str, list[float]] = defaultdict(list)
    for event in events:
        taken[event["name"]].append(event["dur"] / 1000)
    total = sum(map(sum, taken.values()))
    top = sorted(taken.items(), key=lambda item: -sum(item[1]))[:TOP]
    return {
        "busy": round(busy / wall, 4), "blocks": blocks, "wall_ms_per_block": round(1000 * wall / blocks, 2),
        "busy_ms_per_block": round(1000 * busy / blocks, 2), "kernels_per_block": round(len(events) / blocks, 1),
        "long_gaps_per_block": round(len(gaps) / blocks, 1),
        "long_gaps_ms_per_block": round(sum(gaps) / 1000 / blocks, 2),
        "top": [{"name": name, "ms_per_block": round(sum(times) / blocks, 3), "calls_per_block": len(times) / blocks,
                 "share": round(sum(times) / total, 4)} for name, times in top],
    }


def _steady_session(engine: Engine) -> Session:
    session = engine.session(seed=0)
    session.set_prompt("a")
    for _ in range((engine.config.window or 0) // engine.config.num_frame_per_block + 2):
        session.step()
    return session


def busy_share(engine: Engine, blocks: int, folder: Path) -> dict[str, Any] | None:
    """Of `blocks` steady blocks, made and encoded as in a video. None without a GPU, or where the profiler saw no
    kernels. Only the GPU is traced, which hardly slows the host."""
    if engine.device.type != "cuda":
        return None
    config, session = engine.config, _steady_session(engine)
    steps = schedule(wait=0, warmup=1, active=1)
    with (Mp4Writer(folder / "busy.mp4", width=config.width, height=config.height, fps=config.fps,
                    crf=config.crf) as video,
          profile(activities=[ProfilerActivity.CUDA], schedule=steps) as profiler):
        video.write(session.step())
        torch.cuda.synchronize(engine.device)
        profiler.step()  # from warming up to recording
        start = time.perf_counter()
        for _ in range(blocks):
            video.write(session.step())
        torch.cuda.synchronize(engine.device)
        wall = time.perf_counter() - start
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text("utf-8", errors="replace"))["traceEvents"]
    return summarise(events, wall, blocks)


def check_no_waiting(engine: Engine) -> str:
    """Makes blocks with PyTorch's check for synchronising calls set to raise; a switch and an eviction among them."""
    if engine.device.type != "cuda":
        return "no GPU: not checked whether the host waits for it"
    session = engine.session(seed=0)
    session.set_prompt("a")
    session.step()
    torch.cuda.synchronize(engine.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in range(1, 8):
            session.set_prompt("a" if block < 6 else "bb")
            session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronising call in 7 blocks (with a re-cache and evictions)"
