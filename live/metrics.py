"""Figures for Prometheus, in its text format."""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class Counter:
    """A sum that only grows."""

    kind = "counter"

    def __init__(self):
        self._lock, self.value = threading.Lock(), 0.0

    def add(self, amount: float = 1) -> None:
        with self._lock:
            self.value += amount

    def lines(self, name: str) -> list[str]:
        return [f"{name} {self.value:g}" if self.value < 1e6 else f"{name} {self.value:.0f}"]


class Gauge:
    """A value that is read when it is asked for."""

    kind = "gauge"

    def __init__(self, read: Callable[[], float]):
        self.read = read

    def lines(self, name: str) -> list[str]:
        return [f"{name} {float(self.read()):.10g}"]


class Histogram:
    """How many values were below each bound, and their sum."""

    kind = "histogram"

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self.bounds = bounds
        self._lock, self._counts, self._sum = threading.Lock(), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6g}", f"{name}_count {total}"]


class Metrics:
    """All figures of a server."""

    def __init__(self):
        self.frames, self.blocks, self.prompts = Counter(), Counter(), Counter()
        self.frames_sent, self.bytes_sent, self.frames_dropped = Counter(), Counter(), Counter()
        self.failures, self.recordings_failed, self.refused = Counter(), Counter(), Counter()
        self.block_seconds, self.prompt_seconds = Histogram(), Histogram()
        self._all = {
            "frames_total": ("Frames made.", self.frames),
            "blocks_total": ("Blocks made.", self.blocks),
            "prompts_total": ("Prompts asked for in sessions.", self.prompts),
            "frames_sent_total": ("Frames sent to viewers.", self.frames_sent),
            "sent_bytes_total": ("Bytes of frames sent to viewers.", self.bytes_sent),
            "frames_dropped_total": ("Frames that viewers were too slow for.", self.frames_dropped),
            "failures_total": ("Sessions and jobs that an error ended.", self.failures),
            "recordings_failed_total": ("Recordings that stopped early.", self.recordings_failed),
            "refused_total": ("Requests and messages that were refused.", self.refused),
            "block_seconds": ("Seconds that a block took to compute.", self.block_seconds),
            "prompt_seconds": ("Seconds from a prompt's arrival to its first frame sent.", self.prompt_seconds),
        }

    def block(self, seconds: float, frames: int) -> None:
        """Notes a block that was made."""
        self.blocks.add()
        self.frames.add(frames)
        self.block_seconds.observe(seconds)

    def sent(self, size: int, asked_at: float | None) -> None:
        """Notes a frame of so many bytes that was sent. asked_at: when its prompt was asked for, if it is the first
        under it."""
        self.frames_sent.add()
        self.bytes_sent.add(size)
        if asked_at is not None:
            self.prompt_seconds.observe(time.monotonic() - asked_at)

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        self._all[name] = (about, Gauge(read))

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines = []
        for name, (about, metric) in self._all.items():
            full = f"longlive_{name}"
            lines += [f"# HELP {full} {about}", f"# TYPE {full} {metric.kind}", *metric.lines(full)]
        return "\n".join(lines) + "\n"
