"""What a run took: the table at its end, and the same as JSON."""

import resource
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

STAGES = ("text", "denoise", "clean pass", "re-cache", "decode", "encode")


@dataclass
class VideoTimes:
    """One video: seconds of every run of each stage, and of the wall clock from its first step to its closed file."""

    name: str
    frames: int = 0
    latents: int = 0
    wall: float = 0.0
    stages: dict[str, list[float]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {"wall_seconds": round(self.wall, 3), "frames_per_second": round(self.frames / max(self.wall, 1e-9), 2),
                "stage_seconds": {stage: round(sum(runs), 3) for stage, runs in self.stages.items()}}


@dataclass
class RankReport:
    """All that one process did."""

    videos: list[VideoTimes] = field(default_factory=list)
    load: float = 0.0
    text: float = 0.0
    gpu_bytes: int = 0
    host_bytes: int = 0


def peak_gpu(device: torch.device) -> int:
    """Most bytes of GPU memory that were allocated at a time; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_host() -> int:
    """Most bytes of host memory that this process had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Bytes of host memory that this process has resident now (its peak where the system does not tell)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_host()


def to_json(reports: list[RankReport]) -> dict[str, Any]:
    """All of it, and totals: seconds added up over processes, but `wall_seconds` of the one that took longest."""
    return {"totals": _totals(reports), "ranks": [asdict(report) for report in reports]}


def _totals(reports: list[RankReport]) -> dict[str, Any]:
    videos = [video for report in reports for video in report.videos]
    runs: dict[str, list[float]] = defaultdict(list)
    for video in videos:
        for stage, seconds in video.stages.items():
            runs[stage] += seconds
    work = [sum(video.wall for video in report.videos) for report in reports]
    longest = max(work, default=0.0)
    frames = sum(video.frames for video in videos)
    return {
        "processes": len(reports),
        "videos": len(videos), "frames": frames, "latents": sum(video.latents for video in videos),
        "load_seconds": sum(report.load for report in reports),
        "text_seconds": sum(report.text for report in reports) + sum(runs.pop("text", [])),
        "stages": {stage: {"seconds": sum(runs[stage]), "runs": len(runs[stage]),
                           "median": statistics.median(runs[stage])} for stage in STAGES if runs.get(stage)},
        "total_seconds": sum(work), "wall_seconds": longest, "frames_per_second": frames / longest if longest else 0.0,
        "peak_gpu_bytes": max(report.gpu_bytes for report in reports),
        "peak_host_bytes": max(report.host_bytes for report in reports),
    }


def table(reports: list[RankReport], fps: int) -> str:
    """The table at the end of a run. Frames per second are pixels out per second of wall clock, the decoder and the
    encoder included, loading and text apart."""
    totals = _totals(reports)
    several = totals["processes"] > 1
    lines = [f"{'stage':12}{'seconds':>10}{'runs':>8}{'median ms':>12}",
             f"{'load':12}{totals['load_seconds']:10.2f}", f"{'text':12}{totals['text_seconds']:10.2f}"]
    lines += [f"{stage:12}{row['seconds']:10.2f}{row['runs']:8}{1000 * row['median']:12.1f}"
              for stage, row in totals["stages"].items()]
    what = f"seconds of {totals['processes']} processes added up" if several else "wall clock"
    lines += [f"{'total':12}{totals['total_seconds']:10.2f}   ({what}, without load and text)"]
    if several:
        lines += [f"{'wall clock':12}{totals['wall_seconds']:10.2f}   (of the process that took longest, without load "
                  f"and text)"]
    count, speed = totals["videos"], totals["frames_per_second"]
    lines += [f"{count} video{'' if count == 1 else 's'}, {totals['latents']} latents, {totals['frames']} frames, "
              f"{totals['frames'] / fps:.1f} s of video; {speed:.1f} frames/s end to end, {speed / fps:.2f}x real time"]
    gpu = f"{totals['peak_gpu_bytes'] / 2**30:.2f} GiB GPU, " if totals["peak_gpu_bytes"] else ""
    each = " of one process at the most" if several else ""
    lines += [f"peak memory{each}: {gpu}{totals['peak_host_bytes'] / 2**30:.2f} GiB host"]
    return "\n".join(lines)
