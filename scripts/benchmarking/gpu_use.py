"""Whether the GPU is kept busy: the share of time in which a kernel runs, and that the host never waits for it."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.engine import Engine
from pipeline.session import Session
from utils.config import Config
from utils.video import Mp4Writer

LONG_GAP = 0.1  # ms without a kernel that are more than the step from one to the next
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a Chrome trace
TOP = 25  # kernels that are listed
TOP_PAUSES = 8


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def pauses(events: Iterable[dict]) -> list[tuple[str, float]]:
    """Of each time between two events in which none ran: the name of the one that ended last before it, and its
    length in µs."""
    found, last, reached = [], None, 0.0
    for event in sorted(events, key=itemgetter("ts")):
        if last is not None and event["ts"] > reached:
            found.append((last, event["ts"] - reached))
        end = event["ts"] + event["dur"]
        if last is None or end > reached:
            last, reached = event["name"], end
    return found


def _by_name(pairs: Iterable[tuple[str, float]]) -> list[tuple[str, list[float]]]:
    """Of pairs (name, time), the times of each name; the names with the largest sums first."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for name, taken in pairs:
        grouped[name].append(taken)
    return sorted(grouped.items(), key=lambda item: -sum(item[1]))


def summarise(events: list[dict], wall: float, blocks: int) -> dict[str, Any] | None:
    """The share of `wall` seconds in which a kernel or a copy ran, which took most, and after which the GPU was idle
    longest. events: of a Chrome trace, times in µs, of `blocks` blocks. None where no kernel is among them."""
    events = [event for event in events if event.get("cat") in ON_GPU]
    if not events:
        return None
    intervals = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    busy, idle = union(intervals) / 1e6, pauses(events)
    gaps = [length for _, length in idle if length > 1000 * LONG_GAP]
    taken = _by_name((event["name"], event["dur"] / 1000) for event in events)
    total = sum(sum(times) for _, times in taken)
    return {
        "busy": round(busy / wall, 4), "blocks": blocks, "wall_ms_per_block": round(1000 * wall / blocks, 2),
        "busy_ms_per_block": round(1000 * busy / blocks, 2), "kernels_per_block": round(len(events) / blocks, 1),
        "long_gaps_per_block": round(len(gaps) / blocks, 1),
        "long_gaps_ms_per_block": round(sum(gaps) / 1000 / blocks, 2),
        "top": [{"name": name, "ms_per_block": round(sum(times) / blocks, 3), "calls_per_block": len(times) / blocks,
                 "share": round(sum(times) / total, 4)} for name, times in taken[:TOP]],
        "pauses_ms_per_block": round(sum(length for _, length in idle) / 1000 / blocks, 2),
        "idle_after": [{"name": name, "ms_per_block": round(sum(times) / 1000 / blocks, 3),
                        "pauses_per_block": len(times) / blocks} for name, times in _by_name(idle)[:TOP_PAUSES]],
    }


def blocks_until_steady(config: Config) -> int:
    """After so many blocks of a video the next ones do nothing for the first time. Once the window is full, the ring
    goes round twice: passes over a slot are captured as a CUDA graph, and its first replays take longer."""
    if config.window is None:
        return 2
    return (config.window + 2 * (config.window - config.model_kwargs.sink_size)) // config.num_frame_per_block


def _steady_session(engine: Engine) -> Session:
    session = engine.session(seed=0)
    session.set_prompt("a")
    for _ in range(blocks_until_steady(engine.config)):
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
