"""The live server's latency and speed, through real WebSocket clients on this machine.

A server is started over the config's model, or with --random over random weights of the real shapes (no checkpoint is
needed). Clients play at the video's own pace, as the page does, and send prompts at random moments. Reported:

- prompt to picture: from a prompt's sending to the moment its first frame is due on the screen
- prompt to socket: from a prompt's sending to its first frame's arrival
- of each session frames shown a second, and the longest time between two frames' arrival: whether one starves
- milliseconds that a block's stages take

With --minutes the clients watch for so long, and it is also reported how memory went, in even steps, and whether every
frame that was made is in the recording.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
import uvicorn
from imageio_ffmpeg import count_frames_and_secs
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_weights import SIZES
from live.limits import Limits
from live.packets import HEADER, STILL
from live.security import Access
from live.server import listen, make_app, server_config
from live.storage import Storage
from live.studio import Studio
from pipeline.engine import Engine
from scripts.benchmarking.random_engine import random_engine
from utils.config import load_config
from utils.report import peak_gpu, resident

SUBJECTS, COLOURS = ("ball", "boat", "balloon", "fish", "star"), ("red", "blue", "yellow", "white", "purple", "green")
REPORT_EVERY = 4  # frames
SETTLE = 5.0  # seconds from the first picture to the first prompt


@dataclass
class Client:
    """A player: takes frames as they come, shows them one after the other at `fps`, and asks for a new prompt from time
    to time. Times in seconds."""

    host: str
    session: str
    fps: int
    prompts: int
    seed: int
    least_seconds: float = 0.0  # to watch, also when all prompts are sent
    most_seconds: float = math.inf  # to watch, also when they are not
    pause: tuple[float, float] = (0.6, 2.5)  # from one prompt's first picture to the next prompt
    to_picture: list[float] = field(default_factory=list)
    to_socket: list[float] = field(default_factory=list)
    shown: int = 0
    bytes: int = 0
    late: int = 0  # frames that were not there when they were due
    seconds: float = 0.0
    longest_gap: float = 0.0  # between two frames' arrival

    def run(self) -> None:
        chance = random.Random(self.seed)
        address = f"ws://{self.host}/api/sessions/{self.session}/live"
        with connect(address, max_size=None, compression=None, proxy=None) as socket:
            self._play(socket, chance)

    def _play(self, socket, chance: random.Random) -> None:
        waiting: deque = deque()  # (take, index, number) of frames not shown yet
        turn, block, due, began, sent, number, newest = 0.0, 12, None, None, None, None, None
        arrived: dict[int, float] = {}
        ask_at, asked, opened = math.inf, 0, time.perf_counter()
        while len(self.to_picture) < self.prompts or began is None or time.perf_counter() - began < self.least_seconds:
            now = time.perf_counter()
            if now - opened > self.most_seconds:
                break
            if now >= ask_at and sent is None:
                asked += 1
                prompt = f"a {COLOURS[asked % 6]} {SUBJECTS[asked % 5]} number {asked} of {self.seed}"
                sent, number = now, None
                socket.send(json.dumps({"type": "prompt", "prompt": prompt, "id": asked}))
            if waiting and (due is None or now >= due):
                take, index, shows = waiting.popleft()
                period = max(1 / self.fps, 1.02 * turn / block)
                self.late += due is not None and now - due > period
                due = now + period if due is None or now - due > 2 * period else due + period
                self.shown += 1
                if began is None:
                    began, ask_at = now, now + SETTLE
                if self.shown % REPORT_EVERY == 0 or not waiting:
                    socket.send(json.dumps({"type": "played", "take": take, "frames": index + 1}))
                if sent is not None and number is not None and shows >= number:
                    self.to_picture.append(now - sent)
                    self.to_socket.append(arrived[number] - sent)
                    sent, ask_at = None, now + chance.uniform(*self.pause)
            timeout = 0.05 if due is None or not waiting else max(0.0, min(0.05, due - time.perf_counter()))
            try:
                item = socket.recv(timeout)
            except TimeoutError:
                continue
            if isinstance(item, bytes):
                _, flags, take, index, shows, _ = HEADER.unpack_from(item)
                self.bytes += len(item)
                now = time.perf_counter()
                arrived.setdefault(shows, now)
                if not flags & STILL:
                    waiting.append((take, index, shows))
                    self.longest_gap = max(self.longest_gap, now - (newest or now))
                    newest = now
                continue
            message = json.loads(item)
            if message["type"] == "state":
                turn, block = message["turn_seconds"], message["block_frames"]
            elif message.get("id") == asked and message["type"] == "ok":
                number = message["number"]
        end = time.perf_counter()
        self.seconds = end - (began or opened)
        self.longest_gap = max(self.longest_gap, end - (newest or opened))  # all of it where nothing came


def percentile(values: list[float], share: float) -> float | None:
    """The value that so large a share is not above; None where there are none."""
    return round(sorted(values)[round(share * (len(values) - 1))], 3) if values else None


def stages(studio: Studio, sessions: list[str]) -> dict[str, float]:
    """Median milliseconds of each stage of a block, over all blocks of the sessions' present takes."""
    times: dict[str, list[float]] = {}
    for take in (studio.show(session).take for session in sessions):
        for name, seconds in take.session.watch.read().items() if take.session else ():
            times.setdefault(name, []).extend(seconds)
    return {name: round(1000 * statistics.median(seconds), 1) for name, seconds in times.items()}


def report(clients: list[Client], engine: Engine, made: float, seconds: float) -> dict:
    """Figures of a run; times in seconds."""
    pictures = [value for client in clients for value in client.to_picture]
    sockets = [value for client in clients for value in client.to_socket]
    rates = [client.shown / client.seconds for client in clients]
    return {
        "sessions": len(clients), "prompts": len(pictures),
        "prompt_to_picture_median": percentile(pictures, 0.5), "prompt_to_picture_p95": percentile(pictures, 0.95),
        "prompt_to_socket_median": percentile(sockets, 0.5), "prompt_to_socket_p95": percentile(sockets, 0.95),
        "frames_per_second_shown": [round(rate, 2) for rate in rates],
        "frames_per_second_made": round(made / seconds, 2),
        "longest_gap": [round(client.longest_gap, 3) for client in clients],
        "late_frames_percent": round(100 * sum(c.late for c in clients) / max(1, sum(c.shown for c in clients)), 2),
        "megabits_per_second": round(8e-6 * statistics.mean(c.bytes / c.seconds for c in clients), 2),
        "peak_gpu_gib": round(peak_gpu(engine.device) / 2**30, 2), "host_gib": round(resident() / 2**30, 2),
    }


class Watch:
    """Memory of this process over time, MiB, sampled in a thread of its own."""

    def __init__(self, every: float):
        self.samples: list[float] = []
        self._every, self._end = every, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self.samples.append(resident() / 2**20)

    def stop(self) -> list[float]:
        """Eleven samples, from the first to the last."""
        self._end.set()
        self._thread.join()
        last = len(self.samples) - 1
        return [round(self.samples[round(i * last / 10)], 1) for i in range(11) if last >= 0]


def recorded(http: httpx.Client, session: str, folder: Path) -> dict[str, int]:
    """Frames of a session that were made, and those in its MP4, counted in what its download gives."""
    http.patch(f"/api/sessions/{session}", json={"paused": True}).raise_for_status()
    before = None
    while (made := http.get(f"/api/sessions/{session}").json()["frames"]) != before:
        before = made
        time.sleep(2)
    path = folder / f"downloaded-{session}.mp4"
    with http.stream("GET", f"/api/sessions/{session}/video.mp4") as answer:
        answer.raise_for_status()
        with path.open("wb") as file:
            for part in answer.iter_bytes():
                file.write(part)
    return {"made": made, "recorded": count_frames_and_secs(str(path))[0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, such as height=720")
    parser.add_argument("--config", default="configs/demo_interactive.yaml")
    parser.add_argument("--random", choices=SIZES, help="random weights of these shapes, not the config's model")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of a run, shared among its sessions")
    parser.add_argument("--pause", type=float, nargs=2, metavar=("LEAST", "MOST"),
                        help="seconds from a prompt's picture to the next one (default: 0.6 2.5; with --minutes 8 12)")
    parser.add_argument("--most-seconds", type=float, default=math.inf, help="of a run, also with prompts left")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 3], help="sessions at a time, a run each")
    parser.add_argument("--minutes", type=float, default=0, help="watch at least so long, with a prompt every 10 s")
    parser.add_argument("--lead", type=float, default=Limits.lead_seconds, help="seconds made before they are needed")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    args.pause = tuple(args.pause or ((8.0, 12.0) if args.minutes else Client.pause))
    config = load_config(None if args.random else args.config, args.overrides)
    engine = random_engine(config, args.random) if args.random else Engine.from_config(config)
    limits = Limits(lead_seconds=args.lead, sessions=max(args.sessions))
    with tempfile.TemporaryDirectory(prefix="longlive-benchmark-") as folder:
        studio = Studio(config, limits, Storage(Path(folder), limits.disk_bytes), lambda progress: engine, {})
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(server_config(make_app(studio, Access(), []), studio))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            measure_all(studio, engine, f"127.0.0.1:{listener.getsockname()[1]}", Path(folder), args)
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


def measure_all(studio: Studio, engine: Engine, host: str, folder: Path, args: argparse.Namespace) -> None:
    """A run for each number of sessions; prints their figures, and writes them after each."""
    begun = time.perf_counter()
    while studio.stage:
        time.sleep(0.1)
        if studio.failure:
            raise SystemExit(studio.failure)
    config, on_gpu = studio.config, engine.device.type == "cuda"
    about = {"device": torch.cuda.get_device_name(engine.device) if on_gpu else "CPU", "torch": torch.__version__,
             "threads": torch.get_num_threads(), "size": f"{config.height}x{config.width}",
             "first_blocks_seconds": round(time.perf_counter() - begun, 1)}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = []
    with httpx.Client(base_url=f"http://{host}", timeout=60, trust_env=False) as http:
        for count in args.sessions:
            results.append(measure(studio, engine, http, host, folder, count, args))
            print("\n".join(f"{key:28}{value}" for key, value in results[-1].items()) + "\n", flush=True)
            if args.json:
                args.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    print(table(results))


def measure(studio: Studio, engine: Engine, http: httpx.Client, host: str, folder: Path, count: int,
            args: argparse.Namespace) -> dict:
    """The figures of a run of `count` sessions."""
    sessions = [http.post("/api/sessions", json={"prompt": "a red ball", "seed": i}).json()["id"]
                for i in range(count)]
    clients = [Client(host, one, studio.config.fps, math.ceil(args.prompts / count), i, 60 * args.minutes,
                      args.most_seconds, args.pause) for i, one in enumerate(sessions)]
    threads = [threading.Thread(target=client.run) for client in clients]
    before, start = studio.metrics.frames.value, time.perf_counter()
    watch = Watch(every=max(1.0, 0.3 * args.minutes))
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    figures = report(clients, engine, studio.metrics.frames.value - before, time.perf_counter() - start)
    figures |= {"host_mib_over_time": watch.stop(), "block_milliseconds": stages(studio, sessions)}
    if args.minutes:
        figures["frames"] = [recorded(http, one, folder) for one in sessions]
    for one in sessions:
        http.delete(f"/api/sessions/{one}")
    return figures


def table(results: list[dict]) -> str:
    """The main figures, a line a run."""
    def pair(run: dict, name: str) -> str:
        return " / ".join("-" if run[f"{name}_{which}"] is None else f"{run[f'{name}_{which}']:.2f}"
                          for which in ("median", "p95"))

    lines = ["sessions  prompts  to socket, s (median / p95)  to picture, s  frames/s of each        longest gap, s"]
    for run in results:
        rates = " ".join(f"{rate:.1f}" for rate in run["frames_per_second_shown"])
        lines.append(f"{run['sessions']:<10}{run['prompts']:<9}{pair(run, 'prompt_to_socket'):<29}"
                     f"{pair(run, 'prompt_to_picture'):<15}{rates:<24}{max(run['longest_gap']):.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
