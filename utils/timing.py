import time
from collections import defaultdict
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds spent in each stage of a video.

    On a GPU a stage is timed between two events on the stream, so timing never makes the host wait; `read` gives the
    stages that the device has finished.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str):
        """Times the body and adds it to stage `name`."""
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            start = time.perf_counter()
            yield
            self._samples[name].append(time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self._samples[name].append(seconds)

    def read(self) -> dict[str, list[float]]:
        """Seconds of every finished run of each stage, in order."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.pop(0)
            self._samples[name].append(start.elapsed_time(end) / 1000)
        return self._samples
