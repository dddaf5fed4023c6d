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
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from demo.evaluation import plan, report, sheets
from demo.evaluation.films import Studio, drawn, generated
from demo.evaluation.measure import measure
from demo.evaluation.plan import ARMS, DRAWN, GROUPS, MAIN, ON_ANY_DEVICE, PROMPT, TIMELINE, Task
from demo.judge import WEIGHTS, WINDOW, Judge
from demo.world import FPS
from pipeline.engine import Engine
from pipeline.precision import check_precision
from utils.cli import Parser, guarded
from utils.config import Config, load_config
from utils.device import pick_device
from utils.errors import UserError
from utils.paths import find_file
from utils.prompts import LONGEST_SECONDS
from utils.video import check_writable


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises UserError for a command line that does not make sense."""
    parser = Parser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml", help="YAML config")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder of the films, their numbers and the report")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--judge", type=Path, default=WEIGHTS, help="weights of the judge")
    parser.add_argument("--prompts", type=int, default=208, help="films of held-out prompts")
    parser.add_argument("--timelines", type=int, default=64, help="films whose prompt switches")
    parser.add_argument("--seconds", type=float, default=240, help="of each prompt's film")
    parser.add_argument("--timeline-seconds", type=float, default=60, help="of each timeline, at most --seconds")
    parser.add_argument("--ablation-prompts", type=int, default=64, help="so many prompts in the other arms")
    parser.add_argument("--batch", type=int, default=64, help="films made together")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, timelines and noise")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that write and read MP4s")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(ON_ANY_DEVICE), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th batch, from the I-th on")
    parser.add_argument("--report", action="store_true", help="only tables and pictures of what is there")
    parser.add_argument("--story", type=int, default=0, help="the timeline of the animated picture")
    args = parser.parse_intermixed_args(argv)
    for option, least in (("prompts", 0), ("timelines", 0), ("ablation_prompts", 0), ("batch", 1), ("seed", 0),
                          ("workers", 1), ("story", 0)):
        if (value := getattr(args, option)) < least:
            raise UserError(f"--{option.replace('_', '-')} {value} must be at least {least}")
    if not 2 * WINDOW + 8 <= args.seconds * FPS <= LONGEST_SECONDS * FPS:
        raise UserError(f"--seconds {args.seconds:g}: the judge needs two windows of {WINDOW} frames; give from 6 to "
                        f"{LONGEST_SECONDS:,}")
    if not 0 < args.timeline_seconds <= LONGEST_SECONDS:
        raise UserError(f"--timeline-seconds {args.timeline_seconds:g} must be above 0 and at most "
                        f"{LONGEST_SECONDS:,}")
    args.share = _share(args.share)
    if not args.report:
        args.judge = find_file(str(args.judge), "--judge", "give the weights that python -m demo.judge train writes")
        pick_device(args.device)
        check_writable(args.out, "--out")
    return args


def _share(text: str) -> tuple[int, int]:
    """I and N of --share."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise UserError(f"--share {text} must be I/N with I below N: 0/2 and 1/2 for two processes")
    return int(found[1]), int(found[2])


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
    for arm in {task.arm for task in every} - {DRAWN}:  # before an hour of films of the others
        check_precision(_config(args, arm).precision, pick_device(args.device))
    index, count = args.share
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
                engines = {} if task.arm == DRAWN else {task.arm: Engine.from_config(_config(args, task.arm))}
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


def _config(args: argparse.Namespace, arm: str) -> Config:
    return load_config(args.config, [*args.overrides, f"device={args.device}", "cache_merged=false",
                                     "cuda_graphs=false", *ARMS[arm].overrides])


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
