"""Measures the small model: makes films of held-out prompts and of switch timelines, and has the judge watch the MP4s.

    python -m demo.evaluate configs/demo.yaml --out measured --device cuda
    python -m demo.evaluate configs/demo.yaml --out measured --device cuda:1 --only recache sink
    python -m demo.evaluate --out measured --report

A batch whose numbers are in OUT/parts is not made again: runs can be stopped, and several processes can share the work
by --only and --share. Nothing there tells one model from another: give each its own OUT.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from demo.evaluation import plan, report, sheets
from demo.evaluation.films import Studio, drawn, generated
from demo.evaluation.measure import measure
from demo.evaluation.plan import ARMS, DRAWN, GROUPS, MAIN, PROMPT, TIMELINE, Task
from demo.judge import WEIGHTS, WINDOW, Judge
from demo.world import FPS
from pipeline.engine import Engine
from utils.cli import guarded
from utils.config import load_config
from utils.errors import UserError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=208)
    parser.add_argument("--timelines", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=240, help="of each prompt's film")
    parser.add_argument("--timeline-seconds", type=float, default=60, help="of each timeline, at most --seconds")
    parser.add_argument("--ablation-prompts", type=int, default=64, help="so many prompts in the other arms")
    parser.add_argument("--batch", type=int, default=64, help="films made together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that write and read MP4s")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th batch, from the I-th on")
    parser.add_argument("--report", action="store_true", help="only tables and pictures of what is there")
    parser.add_argument("--story", type=int, default=0, help="the timeline of the animated picture")
    args = parser.parse_args(argv)
    if args.seconds * FPS < 2 * WINDOW + 8:
        parser.error(f"--seconds {args.seconds:g} is too short, the judge needs two windows of {WINDOW} frames; give "
                     f"at least 6")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        make(args)
    write_report(args)


def make(args: argparse.Namespace) -> None:
    """Makes and measures all batches of this process that are not measured yet."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.0f} s] {text}", flush=True)

    config = load_config(args.config, [*args.overrides, f"device={args.device}"])
    block = config.num_frame_per_block
    films = plan.prompts(args.prompts, args.seconds, args.seed)
    films += plan.timelines(args.timelines, min(args.timeline_seconds, args.seconds), args.seed, block)
    every = list(plan.tasks(films, args.only, args.batch, args.ablation_prompts,
                            config.model_kwargs.use_infinite_attention))
    index, count = map(int, args.share.split("/"))
    parts = args.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    todo = [task for task in every[index::count] if not _is_measured(parts / f"{task.name}.json", task)]
    say(f"{len(todo)} batches to make, of {len(every)}")
    engines: dict[str, Engine] = {}
    judge: Judge | None = None
    waiting: Future | None = None
    with ThreadPoolExecutor(1) as behind:  # one batch is measured while the next is made
        for task in todo:
            studio = Studio(args.out, config.crf, args.workers, lambda text, task=task: say(f"{task.name}: {text}"))
            if task.arm not in engines:
                engines = {} if task.arm == DRAWN else {task.arm: _engine(args, task.arm)}
            if judge is None:
                device = next(iter(engines.values())).device if engines else _drawing_device(args.device)
                judge = Judge.load(args.judge, device)
            frames = drawn(task.films, task.frames, block, judge.device) if task.arm == DRAWN else \
                generated(engines[task.arm], task.films, task.arm)
            paths = studio.shoot(task.arm, task.films, frames)
            say(f"{task.name}: made")
            if waiting is not None:
                waiting.result()
            waiting = behind.submit(_measure, args, task, paths, block, judge, say)
        if waiting is not None:
            waiting.result()


def _is_measured(path: Path, task: Task) -> bool:
    """Whether a part has the numbers of just these films."""
    if not path.exists():
        return False
    have = [(row["name"], row["seed"], row["captions"], row["frames"]) for row in json.loads(path.read_text("utf-8"))]
    return have == [(film.name, film.seed, film.captions, task.frames) for film in task.films]


def _engine(args: argparse.Namespace, arm: str) -> Engine:
    overrides = [*args.overrides, f"device={args.device}", "cache_merged=false", *ARMS[arm].overrides]
    return Engine.from_config(load_config(args.config, overrides))


def _drawing_device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _measure(args: argparse.Namespace, task: Task, paths: list[Path], block: int, judge: Judge, say) -> None:
    rows = list(measure(task.films, paths, task.arm, block, judge, args.workers))
    path = args.out / "parts" / f"{task.name}.json"
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(rows), "utf-8")
    part.replace(path)
    say(f"{task.name}: measured")


def write_report(args: argparse.Namespace) -> None:
    """Tables, curves, contact sheets and the animated picture of what is in `--out`."""
    rows = report.read_parts(args.out / "parts")
    if not rows:
        raise UserError(f"{args.out / 'parts'} has no measurements; run without --report first")
    told = report.summary(rows)
    (args.out / "report.json").write_text(json.dumps(told, indent=1), "utf-8")
    text = report.markdown(told)
    (args.out / "report.md").write_text(text, "utf-8")
    print(text, flush=True)
    try:
        report.curves(told, args.out / "curves.png")
    except ImportError:
        print("no curves.png: matplotlib is not installed", flush=True)
    for arm, every in rows.items():
        folder = args.out / "videos" / arm.replace(" ", "-")
        for kind, draw in ((PROMPT, sheets.prompt_sheet), (TIMELINE, sheets.timeline_sheet)):
            there = [row for row in report.of_kind(every, kind) if (folder / f"{row['name']}.mp4").exists()]
            if there:
                draw(there, folder, args.out / f"{kind}s-{folder.name}.png")
    stories = report.of_kind(rows.get(MAIN, []), TIMELINE)
    if stories:
        row = stories[args.story % len(stories)]
        folder = args.out / "videos" / MAIN
        if (folder / f"{row['name']}.mp4").exists():
            sheets.animation(row, folder, args.out / "story.webp")
    print(f"{args.out}: report.md, report.json and pictures", flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
