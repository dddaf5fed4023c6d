"""Fresh processes of the benchmark: the time from their start to a first frame, and several at once, one a GPU.

A child writes a line of JSON when its first frames are on the host. It ends there unless it reads a number of latents;
then it warms up, says so, and at the next line that it reads it makes a video as long as that and writes its times.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine
from scripts.benchmarking.videos import make, timeline
from utils.errors import UserError

PROGRAM = Path(__file__).resolve().parents[1] / "benchmark.py"
CHILD = "--child"  # the option that makes a process one


def serve(make_engine: Callable[[], Engine], folder: Path) -> None:
    """What a child does."""
    start = time.perf_counter()
    engine = make_engine()
    weights = time.perf_counter()
    session = engine.session(seed=0)
    session.set_prompt("a")
    session.step()
    del session
    _say({"weights_seconds": weights - start, "first_block_seconds": time.perf_counter() - weights})
    if line := sys.stdin.readline():
        make(engine, "warm-up", timeline(engine, (engine.config.window or 0) + 2 * engine.config.num_frame_per_block),
             folder)
        _say({"ready": True})
        sys.stdin.readline()
        began = time.time()
        video = make(engine, "shared", timeline(engine, int(line)), folder)
        _say({"began": began, "ended": time.time(), "video": dataclasses.asdict(video)})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class Child:
    """A fresh process of the benchmark, with options of its own."""

    def __init__(self, options: list[str]):
        self.began = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, str(PROGRAM), *options, CHILD], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        """The next message. Raises RuntimeError where the process ended before it, and SystemExit where that was for
        bad input, which it has told by then."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        if code == 2:
            raise SystemExit(code)
        raise RuntimeError(f"a process of the benchmark ended with exit code {code} before its turn; what it said is "
                           f"above")

    def tell(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def cold_start(options: list[str]) -> dict[str, float]:
    """Seconds from the start of a fresh process to its first frames on the host, and of its parts. Its weights are
    drawn, where a front-end reads them from a disk."""
    with Child(options) as child:
        message = child.hear()
        total = time.perf_counter() - child.began
    parts = {"weights": message["weights_seconds"], "first_block": message["first_block_seconds"]}
    return {"seconds": round(total, 2), "start_and_imports": round(total - sum(parts.values()), 2),
            **{name: round(seconds, 2) for name, seconds in parts.items()}}


def at_once(options: list[str], count: int, latents: int) -> dict[str, Any]:
    """`count` processes, each on a GPU of its own where there are any, make a video of `latents` latents at the same
    time. → the frames/s of all together, over the time from the first one's start to the last one's end.

    Raises UserError where there are fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"--gpus {count}, but PyTorch sees {gpus} here; use --gpus {gpus} or fewer")
    devices = [f"device=cuda:{index}" if gpus else "device=cpu" for index in range(count)]
    with ExitStack() as stack:
        children = [stack.enter_context(Child([*options, device])) for device in devices]
        messages = [child.hear() for child in children]
        for line in (str(latents), "go"):
            for child in children:
                child.tell(line)
            messages = [child.hear() for child in children]
    seconds = max(m["ended"] for m in messages) - min(m["began"] for m in messages)
    videos = [message["video"] for message in messages]
    return {"processes": count, "frames_per_second": round(sum(v["frames"] for v in videos) / seconds, 2),
            "seconds": round(seconds, 2), "videos": videos}
