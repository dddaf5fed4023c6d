"""Without a page: prompts from the terminal, one MP4."""

import logging
import queue
import re
import sys
import threading
import time
from concurrent.futures import Future
from typing import TextIO

from live.cli import LiveTask
from live.messages import check_prompt
from live.recording import Recording
from live.refused import Refused
from live.storage import Storage
from live.take import Change, Take
from pipeline.engine import Engine
from utils.errors import UserError
from wan.geometry import frames_of

log = logging.getLogger(__name__)

HELP = ("Type a prompt and press Enter, at any time; '@12 a prompt' for second 12; an empty line or Ctrl-D ends the "
        "video. Of several prompts for one block the last wins.")


def play(task: LiveTask, storage: Storage, weights: dict[str, str], source: TextIO | None = None) -> None:
    """Makes a video under the prompts that are typed, at the speed it will be seen at as long as more may come. The end
    of what is typed ends it, that of a file or pipe only where no --seconds say more; so does Ctrl-C. It is whole then.
    """
    source = source or sys.stdin
    typed = source.isatty()
    engine = Engine.from_config(task.config, progress=lambda part: log.info("Loading: %s", part))
    take = Take(task.config, task.config.seed)
    recording = Recording(take, storage, weights)
    lines: queue.SimpleQueue = queue.SimpleQueue()
    if typed:
        log.info("%s", HELP)
    if task.prompt is not None:
        lines.put(task.prompt)
    threading.Thread(target=_read, args=(source, lines), daemon=True).start()
    log.info("The video is %s while it is made", recording.path.with_suffix(".partial.mp4"))
    try:
        _make(task, engine, take, recording, lines, typed)
    except KeyboardInterrupt:
        log.info("")
    finally:
        recording.finish()
    if recording.failure:
        raise UserError(f"{recording.failure} after {recording.whole} frames; {recording.path}")
    if recording.whole:
        log.info("%s: %d frames, %.1f s", recording.path, recording.whole, recording.whole / task.config.fps)
    for change in take.waiting:
        log.warning("never shown, the video ended before its block: %s", change.prompt)


def _make(task: LiveTask, engine: Engine, take: Take, recording: Recording, lines: queue.SimpleQueue,
          typed: bool) -> None:
    fps, start, more = task.config.fps, None, True
    most = round(fps * (task.limits.session_seconds if task.seconds is None else task.seconds))
    while take.frames < most:
        more = more and _take_lines(task, engine, take, lines)
        if not more and typed:
            return
        if not more and task.seconds is None and take.frames >= frames_of(task.config.num_output_frames):
            return
        if not take.can_go_on():
            if not more:
                raise UserError("no prompt for the start of the video: give --prompt TEXT, or a line without @")
            continue
        start = start or time.monotonic()
        waiting = take.waiting
        change = take.pick()
        for passed in (one for one in waiting if one is not change and one not in take.waiting):
            _say_replaced(passed)
        block = take.done(change, take.make(engine, change))
        recording.write(block.frames[: most - block.first])
        if recording.failure:
            return
        if change is not None:
            log.info("%7.2f s  %s", block.first / fps, change.prompt)
        if more:
            time.sleep(max(0.0, start + take.frames / fps - task.limits.lead_seconds - time.monotonic()))


def _take_lines(task: LiveTask, engine: Engine, take: Take, lines: queue.SimpleQueue) -> bool:
    """Hands the lines that have come to the take; waits for one where it has no prompt. Says whether more may come."""
    while not lines.empty() or not take.can_go_on():
        if (line := lines.get()) is None:
            return False
        _ask(task, engine, take, line)
    return True


def _ask(task: LiveTask, engine: Engine, take: Take, line: str) -> None:
    at = re.fullmatch(r"@\s*(\d{1,7}(?:\.\d+)?)\s+(.+)", line)
    if line.startswith("@") and at is None:
        log.warning("%s: no time and prompt; write '@12 a prompt' for a prompt from second 12 on", line[:90])
        return
    try:
        prompt = check_prompt(at[2] if at else line, task.limits)
    except Refused as refused:
        log.warning("%s", refused)
        return
    embeds: Future = Future()
    embeds.set_result(engine.encode(prompt))
    number = take.number + len(take.scheduled) + 1
    if at is None:
        if take.next is not None:
            _say_replaced(take.next)
        take.ask(Change(prompt, "recache", number, take.latents, embeds))
    elif (latent := take.latent_at(float(at[1]))) < take.latents:
        log.warning("second %s is made already; the video has %.1f s", at[1], take.frames / task.config.fps)
    else:
        take.schedule(Change(prompt, "recache", number, latent, embeds))


def _say_replaced(change: Change) -> None:
    log.warning("never shown, another prompt begins in the same block and wins: %s", change.prompt)


def _read(source: TextIO, lines: queue.SimpleQueue) -> None:
    for line in source:
        if not line.strip() and source.isatty():
            break
        if line.strip():
            lines.put(line.strip())
    lines.put(None)
