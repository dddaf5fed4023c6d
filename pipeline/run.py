"""The whole of a front-end after its arguments: plan, load, encode the prompts, make the videos, report.

All prompts are encoded first and the text encoder is freed then: it is the largest part, and never in memory beside a
video in the making. Under torchrun each process does this for its share of the videos; the first one plans for all.
"""

import json
import logging
import sys
import time
from pathlib import Path

from pipeline.engine import Engine
from pipeline.loading import check_ema, fingerprints
from pipeline.render import Job, describe, plan_jobs, remake_job, render
from utils.cli import Task
from utils.device import pick_device
from utils.distributed import Ranks
from utils.errors import UserError
from utils.prompts import Story
from utils.report import RankReport, peak_gpu, peak_host, table, to_json
from utils.video import check_writable, find_ffmpeg

log = logging.getLogger(__name__)

PLANS_SHOWN = 20


def run(task: Task, stories: list[Story]) -> None:
    """Makes every video of a task that is not there yet: of `stories`, or the one that `task.remake` describes.

    Raises UserError for whatever the user can mend, before anything is computed wherever that is possible.
    """
    with Ranks() as ranks:
        _run(task, stories, ranks)


def _run(task: Task, stories: list[Story], ranks: Ranks) -> None:
    config = task.config
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.WARNING)
    find_ffmpeg()
    check_writable(Path(config.output_folder))
    if task.profile is not None:
        check_writable(task.profile.parent, "--profile")
    for device in (config.device, config.text_encoder_device):
        pick_device(device, ranks.local)
    jobs, finished = ranks.from_first(lambda: _plan(task, stories))
    for path in finished:
        log.info("%s is there already, skipped (--overwrite makes it again)", path)
    _show_plans(jobs, task)
    if jobs:
        reports = _make(jobs, task, ranks)
        if ranks.is_first:
            sys.stdout.write(table(reports, config.fps) + "\n")
    else:
        reports = [RankReport()]
    if ranks.is_first and task.profile is not None:
        _write_profile(task.profile, reports)


def _plan(task: Task, stories: list[Story]) -> tuple[list[Job], list[Path]]:
    weights = fingerprints(task.config)
    check_ema(task.config)
    if task.remake is not None:
        return remake_job(task.remake, task.config, weights, task.overwrite)
    return plan_jobs(stories, task.config, task.frames, weights, task.overwrite, task.overrule)


def _show_plans(jobs: list[Job], task: Task) -> None:
    for job in jobs[:PLANS_SHOWN]:
        for line in describe(job, task.config):
            log.info("%s", line)
    if len(jobs) > PLANS_SHOWN:
        log.info("… and %d more", len(jobs) - PLANS_SHOWN)


def _make(jobs: list[Job], task: Task, ranks: Ranks) -> list[RankReport]:
    start = time.perf_counter()
    engine = ranks.first_then_others(lambda: Engine.from_config(task.config, ranks.local))
    report = RankReport(load=time.perf_counter() - start)
    log.info("Loaded in %.1f s, on %s, %s", report.load, engine.device, engine.attention)
    share = ranks.share(jobs)
    for job in share:
        for segment in job.timeline.segments:
            engine.encode(segment.prompt)
    engine.release_text_encoder()
    report.text = engine.text_seconds
    for job in share:
        report.videos.append(render(engine, job, show_progress=ranks.is_first))
    report.gpu_bytes, report.host_bytes = peak_gpu(engine.device), peak_host()
    return ranks.gather(report)


def _write_profile(path: Path, reports: list[RankReport]) -> None:
    try:
        path.write_text(json.dumps(to_json(reports), indent=1) + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"--profile {path}: can't be written: {error.strerror}") from None
