"""From stories to files: which videos are to be made, and making one."""

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import logging
import platform
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.engine import Engine
from pipeline.session import REFRESHES
from pipeline.timeline import Segment, Timeline
from utils.config import Config
from utils.errors import UserError
from utils.interrupts import held
from utils.prompts import Story, shorten
from utils.report import VideoTimes, peak_gpu
from utils.video import Mp4Writer
from wan.geometry import first_frame, frames_of

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "tokenizers", "numpy")
SHOWN = 90  # characters of a prompt in a plan


@dataclass(frozen=True)
class Job:
    """One video to make: `path` is its MP4, `request` all that decides what it shows. overwrite: the file of another
    request may be replaced."""

    path: Path
    timeline: Timeline
    seed: int
    sample: int
    request: dict[str, Any]
    overwrite: bool = False

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")


def plan_jobs(stories: list[Story], config: Config, frames: int, weights: dict[str, str], overwrite: bool,
              overrule: bool = False) -> tuple[list[Job], list[Path]]:
    """The videos to make, in order, and those that exist already, made by the same request. `frames`, `overrule`: as
    `Story.timeline` has them.

    A file that another request made is never overwritten, unless `overwrite`: the new video is called NAME-2.
    """
    folder = Path(config.output_folder)
    jobs, finished, taken = [], [], set()
    for number, story in enumerate(stories if config.inference_iter == -1 else stories[:config.inference_iter]):
        timeline = story.timeline(config, frames, overrule)
        seed = config.seed if story.seed is None else story.seed
        for sample in range(config.num_samples):
            request = request_of(timeline, seed, sample, config, weights)
            path, done = _free_path(folder, _name(story, number, sample, config), request, overwrite, taken)
            taken.add(path)
            if done:
                finished.append(path)
            else:
                jobs.append(Job(path, timeline, seed, sample, request, overwrite))
    return jobs, finished


def request_of(timeline: Timeline, seed: int, sample: int, config: Config, weights: dict[str, str]) -> dict[str, Any]:
    """All that decides what a video shows, as it stands in the JSON beside it."""
    request = {"prompts": [_told(segment) for segment in timeline.segments], "frames": timeline.frames,
               "latents": timeline.latents, "seed": seed, "sample": sample, "settings": config.identity(),
               "weights": weights}
    return json.loads(json.dumps(request))  # as it will read from the file


def _told(segment: Segment) -> dict[str, Any]:
    told = asdict(segment)
    if segment.refresh == "recache":  # which goes without saying
        del told["refresh"]
    return told


def _name(story: Story, number: int, sample: int, config: Config) -> str:
    if story.name is not None:
        return story.name if config.num_samples == 1 else f"{story.name}-{sample}"
    if config.save_with_index:
        return f"{number:04d}-{sample}"
    words = re.sub(r"[^\w]+", "-", story.prompts[0].lower())[:60].encode()[:160].decode(errors="ignore").strip("-_")
    return f"{words or 'video'}-{sample}"


def _free_path(folder: Path, name: str, request: dict, overwrite: bool, taken: set[Path]) -> tuple[Path, bool]:
    """Where a video goes, and whether it is there already."""
    for number in itertools.count(1):
        path = folder / (f"{name}.mp4" if number == 1 else f"{name}-{number}.mp4")
        if path in taken:
            continue
        about = _read_sidecar(path.with_suffix(".json"))
        if overwrite or not (path.exists() or about):
            return path, False
        if about.get("request") == request:
            return path, bool(about.get("complete")) and path.exists()
    raise AssertionError("unreachable")


def _read_sidecar(path: Path) -> dict:
    try:
        about = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def remake_job(path: Path, config: Config, weights: dict[str, str], overwrite: bool) -> tuple[list[Job], list[Path]]:
    """The video that the .json beside an MP4 describes, as `plan_jobs` gives it. Raises UserError where it is none."""
    told, block = _read_sidecar(path).get("request"), config.num_frame_per_block
    try:
        segments = tuple(Segment(str(s["prompt"]), int(s["asked"]), int(s["latent"]), s.get("refresh", "recache"))
                         for s in told["prompts"])
        latents, frames, seed, sample = (int(told[key]) for key in ("latents", "frames", "seed", "sample"))
        changed = [file for file, mark in told["weights"].items() if weights.get(file) != mark]
        if any(segment.refresh not in REFRESHES for segment in segments):
            raise ValueError
        if segments[0].latent != 0 or not 0 < frames <= frames_of(latents) or seed < 0 or sample < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"--remake {path}: not a description of a video; give the .json that lies beside an "
                        f".mp4") from None
    if any(latent % block for latent in (latents, *(segment.latent for segment in segments))):
        raise UserError(f"--remake {path}: was made with another num_frame_per_block than {block}; leave that out")
    timeline = Timeline(segments, (), block, latents, frames)
    if changed:
        log.warning("%s was made with other weights in %s; the video will differ", path, ", ".join(changed))
    request = request_of(timeline, seed, sample, config, weights)
    file, done = _free_path(Path(config.output_folder), path.stem, request, overwrite, set())
    return ([], [file]) if done else ([Job(file, timeline, seed, sample, request, overwrite)], [])


def describe(job: Job, config: Config) -> list[str]:
    """The plan of a video, a line each: which prompt from which latent, frame and second."""
    timeline = job.timeline
    lines = [f"{job.path}: {timeline.latents} latents in {len(timeline)} blocks, {timeline.frames} frames, "
             f"{timeline.frames / config.fps:.1f} s, seed {job.seed}"]
    for segment in timeline.segments:
        frame = first_frame(segment.latent)
        moved = f" (asked for {segment.asked}, moved to the next block)" if segment.asked != segment.latent else ""
        lines.append(f"  from latent {segment.latent:4}, frame {frame:5}, {frame / config.fps:6.1f} s{moved}: "
                     f"{shorten(segment.prompt, SHOWN)}")
    for segment in timeline.dropped:
        why = "another prompt begins in the same block and wins" if segment.latent < timeline.latents \
            else "the video ends before its block"
        lines.append(f"  never shown, {why}: from latent {segment.asked}: {shorten(segment.prompt, SHOWN)}")
    return lines


def render(engine: Engine, job: Job, show_progress: bool = True) -> VideoTimes:
    """Makes one video: its MP4, and beside it a JSON that says how. Whatever stops it, what was made is kept; a longer
    video of the same request, which begins with the same frames, stays in its place."""
    job = _renamed(job)
    config, timeline = engine.config, job.timeline
    times = VideoTimes(job.path.stem)
    start = time.perf_counter()
    session, sent = None, 0
    with held() as hold:  # a Ctrl-C stops the work, never the finishing of the two files
        there = _frames_there(job)
        writer = Mp4Writer(job.path, width=config.width, height=config.height, fps=config.fps, crf=config.crf,
                           at_least=there)
        try:
            with writer, _progress(job, config, show_progress) as bar:
                with hold.lifted():
                    session = engine.session(job.seed, job.sample)
                for prompt in timeline:
                    with hold.lifted():
                        session.set_prompt(prompt, timeline.refresh_at(session.position))
                        frames = session.step()[: timeline.frames - sent]
                        writer.write(frames)
                    sent += len(frames)
                    _advance(bar, len(frames), start, engine)
        finally:
            times.wall, times.frames = time.perf_counter() - start, writer.frames
            if session is not None:
                times.latents, times.stages = session.position, {**session.watch.read(), "encode": [writer.seconds]}
            _record(job, writer, there, times, config)
    return times


def _renamed(job: Job) -> Job:
    """The job, with another name where another run has made a video of that name since it was planned."""
    path, _ = _free_path(job.path.parent, job.path.stem, job.request, job.overwrite, set())
    if path != job.path:
        log.warning("%s was made by another run meanwhile; this video is %s", job.path, path)
    return replace(job, path=path)


def _frames_there(job: Job) -> int:
    """Frames of the video of the same request that has the name now; 0 where there is none."""
    about = _read_sidecar(job.sidecar)
    frames = about.get("frames")
    same = about.get("request") == job.request and isinstance(frames, int) and job.path.exists()
    return min(frames, job.timeline.frames) if same else 0


def _record(job: Job, writer: Mp4Writer, there: int, times: VideoTimes, config: Config) -> None:
    """Writes the JSON of a video that has its name; says where one is that stopped early. there: frames of the same
    video that the name had before."""
    complete = writer.file == job.path and writer.frames == job.timeline.frames
    if complete:
        write_sidecar(job, times, config, complete)
        return
    place = f"; they are in {writer.file}" if writer.file else f"; {job.path} keeps the {there} it had" if there else ""
    log.warning("Stopped after %d of %d frames%s", writer.frames, job.timeline.frames, place)
    if writer.file == job.path:
        try:
            write_sidecar(job, times, config, complete)
        except UserError as error:
            log.warning("%s", error)  # what stopped the video matters more


def _progress(job: Job, config: Config, show: bool) -> tqdm:
    """Counts frames, for sums of seconds miss their total; shows seconds."""
    return tqdm(total=job.timeline.frames, unit_scale=1 / config.fps, desc=job.path.stem, disable=not show, leave=True,
                bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.1f}/{total:.1f} s [{elapsed}<{remaining}{postfix}]")


def _advance(bar: tqdm, frames: int, start: float, engine: Engine) -> None:
    if bar.disable:
        return
    bar.update(frames)
    speed = bar.n / (time.perf_counter() - start)
    gpu = peak_gpu(engine.device)
    memory = f", {gpu / 2**30:.1f} GiB GPU" if gpu else ""
    bar.set_postfix_str(f"{speed:.1f} frames/s, {speed / engine.config.fps:.2f}x real time{memory}")


def write_sidecar(job: Job, times: VideoTimes, config: Config, complete: bool) -> None:
    """Writes the JSON that describes a video beside it. Raises UserError where it can't be written."""
    about = {
        "video": job.path.name, "complete": complete, "frames": times.frames,
        "seconds": round(times.frames / config.fps, 3), "plan": job.timeline.plan(config.fps),
        "request": job.request, "config": config.to_dict(), "times": times.summary(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
                    | {"python": platform.python_version()},
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    temporary = job.sidecar.with_suffix(".json.part")
    try:
        # A path may hold bytes that are not UTF-8; a backslash escape of those is JSON too.
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
        temporary.replace(job.sidecar)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{job.sidecar}: can't be written: {error.strerror}; the video {job.path} is kept, but will "
                        f"not be skipped by the next run") from None
