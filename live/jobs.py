"""A job: a video that is asked for whole and fetched when it is done."""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from live.limits import Limits
from live.metrics import Metrics
from live.output import Output
from live.recording import Recording
from live.refused import Refused
from live.take import Change, Take
from pipeline.engine import Engine
from pipeline.timeline import Timeline
from utils.config import Config
from utils.prompts import Story, check_story
from wan.geometry import frames_of

log = logging.getLogger(__name__)

MOST_PROMPTS = 100


class JobRun:
    """The video of one story. The generation thread calls `ask_for_turn`, `step` and `fail`; all else is for
    any thread."""

    def __init__(self, story: Story, timeline: Timeline, config: Config, encode: Callable[[str], Future],
                 record: Callable[[Take], Recording], metrics: Metrics, wake: Callable[[], None]):
        self.id = secrets.token_urlsafe(12)
        self.config, self.timeline, self.metrics = config, timeline, metrics
        self._lock = threading.Lock()
        self.take = Take(config, config.seed if story.seed is None else story.seed)
        for number, segment in enumerate(timeline.segments, 1):
            embeds = encode(segment.prompt)
            embeds.add_done_callback(lambda _: wake())
            self.take.schedule(Change(segment.prompt, segment.refresh, number, segment.latent, embeds))
        self.recording = record(self.take)
        self._output = Output(f"job-{self.id[:4]}")
        self.status, self.message = "queued", ""  # queued, running, done, failed, cancelled

    @staticmethod
    def plan(story: Story, config: Config, frames: int, limits: Limits) -> Timeline:
        """What a story will show and when. Raises UserError for a story that does not make sense, Refused for one
        that is too long."""
        if len(story.prompts) > MOST_PROMPTS:
            raise Refused(422, f"a job has at most {MOST_PROMPTS} prompts, got {len(story.prompts)}")
        check_story(story)
        if story.durations is not None:
            frames = round(sum(story.durations) * config.fps)
        elif story.num_output_frames is not None:
            frames = frames_of(story.num_output_frames)
        if frames > limits.session_seconds * config.fps:
            raise Refused(422, f"{frames / config.fps:g} s are more than the {limits.session_seconds:g} s that a video "
                               f"may have here")
        return story.timeline(config, frames)

    @property
    def active(self) -> bool:
        return self.status in ("queued", "running")

    def ask_for_turn(self) -> bool:
        """Whether a block can be made now: its prompt is encoded and the output keeps up."""
        if not self.active or self._output.is_full or self.take.frames >= self.timeline.frames:
            return False
        due = [change for change in self.take.scheduled if change.latent <= self.take.latents]
        return all(change.embeds.done() for change in due)

    def step(self, engine: Engine) -> None:
        """Makes the next block. Raises whatever the engine raises."""
        with self._lock:
            if not self.active:
                return
            self.status = "running"
        change = self.take.pick()
        start = time.monotonic()
        frames = self.take.make(engine, change)
        self.metrics.block(time.monotonic() - start, len(frames))
        left = self.timeline.frames - self.take.frames
        block = self.take.done(change, frames)
        self._output.call(self._write, block.frames[:left])
        if left <= len(block.frames):
            self.take.session = None
            self._output.call(self._finish, "done", "")

    def _write(self, frames: Tensor) -> None:
        if self.active:  # a block that was being made when the job was cancelled comes too late
            self.recording.write(frames)

    def _finish(self, status: str, message: str) -> None:
        self.recording.finish()
        self._output.close()
        if self.recording.whole < self.timeline.frames:
            log.warning("Job %s stopped after %d of %d frames%s", self.id[:4], self.recording.whole,
                        self.timeline.frames, f"; they are in {self.recording.path}" if self.recording.whole else "")
        with self._lock:
            if status == "done" and self.recording.failure:
                status, message = "failed", self.recording.failure
            if self.active:
                self.status, self.message = status, message

    def fail(self, message: str) -> None:
        """Ends it; what was made can be fetched."""
        self.take.session = None
        self._output.call(self._finish, "failed", message)

    def cancel(self) -> None:
        """Ends it; what was made is whole when this returns."""
        self._output.call(self._finish, "cancelled", "")
        self._output.close()

    def file(self, suffix: str) -> Future:
        """The MP4 or JSON of a job that is over: a future of its Path, or of None. Raises Refused before that."""
        if self.active:
            raise Refused(409, f"the job is {self.status}; ask again when it is done")
        path: Future = Future()
        path.set_result(self.recording.path.with_suffix(suffix) if self.recording.whole else None)
        return path

    def state(self) -> dict:
        """How far it is."""
        frames = min(self.take.frames, self.timeline.frames)
        return {"id": self.id, "status": self.status, "message": self.message, "frames": frames,
                "of": self.timeline.frames, "progress": round(frames / self.timeline.frames, 4),
                "seed": self.take.seed, "plan": self.timeline.plan(self.config.fps)}
