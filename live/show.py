"""A live session: one video that plays while it is made and typed."""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from live.limits import Limits
from live.metrics import Metrics
from live.output import Output
from live.packets import pack, still
from live.recording import Recording
from live.refused import Refused
from live.take import Block, Change, Take
from live.viewer import Viewer
from pipeline.engine import Engine
from utils.config import Config
from wan.geometry import frames_of

log = logging.getLogger(__name__)

SEGMENTS_TOLD = 20  # of the newest prompts, in a state that is sent often
STALLED = 60.0  # seconds
SMOOTH = 0.3  # weight of the newest block in the running means


class Show:
    """One take after the other, the viewers that see them, and the recording of the present one.

    | thread               | calls                                                                                |
    |----------------------|--------------------------------------------------------------------------------------|
    | generation (one)     | ask_for_turn, step, fail                                                             |
    | output (a show's own)| _publish, and the recording's write, cut and finish: all that frames need after step |
    | any                  | all else; `_lock` keeps them apart, and is never held while a block is computed      |
    """

    def __init__(self, config: Config, limits: Limits, encode: Callable[[str], Future],
                 record: Callable[[Take], Recording], metrics: Metrics, wake: Callable[[], None]):
        self.id = secrets.token_urlsafe(12)
        self.config, self.limits, self.metrics = config, limits, metrics
        self._encode, self._record, self._wake = encode, record, wake
        self._lock = threading.RLock()
        self._output = Output(f"output-{self.id[:4]}")
        self.viewers: set[Viewer] = set()
        self.take_number = 0
        self.paused, self.endless, self.refresh = False, True, "recache"
        self.length = frames_of(config.num_output_frames)  # where it is not endless
        self.failure = ""  # why it can't go on
        self.closed = False
        self._numbers = 0  # prompts asked for so far
        self._last_seen = time.monotonic()
        self._last: list[bytes] = []  # the newest frame, for whoever comes
        self._asking_since: float | None = None
        self.block_seconds = self.turn_seconds = 0.0  # running means: computing, and from wish to frames
        self.block_frames = frames_of(2 * config.num_frame_per_block) - frames_of(config.num_frame_per_block)
        self.lead = math.ceil(limits.lead_seconds * config.fps)
        self._begin(config.seed)

    def _begin(self, seed: int) -> None:
        self.take = Take(self.config, seed)
        self.recording = self._record(self.take)
        self.take_number += 1
        self.played = 0
        self._last = []

    # What the generation thread asks and does

    def ask_for_turn(self) -> bool:
        """Whether a block should be made now: someone watches and needs it soon. Notes since when that is so."""
        with self._lock:
            wants = self._wants_block()
            if wants and self._asking_since is None:
                self._asking_since = time.monotonic()
            return wants

    def _wants_block(self) -> bool:
        if self.closed or self.failure or self.paused or not self.viewers or self._output.is_full or self.ended:
            return False
        due = self.take.has_due()
        ahead = self.take.frames - self.played
        return self.take.can_go_on() and ahead <= self.lead + (self.block_frames if due else 0)

    @property
    def ended(self) -> str:
        """Why the take goes on no further, or ""."""
        if self.take.frames >= self.limits.session_seconds * self.config.fps:
            return f"a video has at most {self.limits.session_seconds / 60:.0f} minutes here; restart to go on"
        if not self.endless and self.take.frames >= self.length:
            return "switch endless on to go on, or restart"
        return ""

    def step(self, engine: Engine) -> None:
        """Makes the next block and hands it to the output thread. Raises whatever the engine raises."""
        with self._lock:
            take, take_number = self.take, self.take_number
            change = take.pick()
        start = time.monotonic()
        frames = take.make(engine, change)
        now = time.monotonic()
        with self._lock:
            block = take.done(change, frames)
            self._note_times(now - start, now - (self._asking_since or start), len(frames))
            self._asking_since = None
            if not self.closed and take is self.take:
                self._output.call(self._publish, block, take_number, self.recording)

    def _note_times(self, seconds: float, turn: float, frames: int) -> None:
        self.metrics.block(seconds, frames)
        weight = SMOOTH if self.block_seconds else 1.0
        self.block_seconds += weight * (seconds - self.block_seconds)
        self.turn_seconds += weight * (turn - self.turn_seconds)

    def fail(self, message: str) -> None:
        """Ends the take for a reason that viewers are told."""
        with self._lock:
            self.failure, self.take.session, self._asking_since = message, None, None
        self._output.call(self.recording.cut)
        self.changed()

    # What the output thread does

    def _publish(self, block: Block, take_number: int, recording: Recording) -> None:
        asked_at = block.asked_at
        for packet in pack(block, take_number):  # the first is on its way while the next is encoded
            with self._lock:
                if take_number != self.take_number:
                    break
                self._last = [still(packet)]
                for viewer in self.viewers:
                    viewer.show([packet], asked_at)
            asked_at = None
        before = recording.failure
        recording.write(block.frames)
        if recording.failure != before:
            self.metrics.recordings_failed.add()
        self.changed()

    # Viewers

    def attach(self, viewer: Viewer, **more) -> None:
        """A viewer begins to watch, and is told the whole state and what else is given. Raises Refused where there are
        too many."""
        with self._lock:
            if self.closed:
                raise Refused(404, "this session has ended")
            if len(self.viewers) >= self.limits.viewers:
                raise Refused(429, f"this session has {len(self.viewers)} viewers already")
            viewer.played = self.take.frames
            self.viewers.add(viewer)
            self._follow_fastest()
            viewer.send({**self.state(whole=True), **more})
            viewer.show(self._last)
            self.seen()
        self.changed()
        self._wake()

    def detach(self, viewer: Viewer) -> None:
        with self._lock:
            if viewer not in self.viewers:
                return
            self.viewers.discard(viewer)
            self.metrics.frames_dropped.add(viewer.dropped)
            self._follow_fastest()
            self.seen()
        self.changed()

    def report(self, viewer: Viewer, take: int, played: int) -> None:
        """A viewer's player has shown so many frames of a take."""
        with self._lock:
            if take == self.take_number and viewer in self.viewers:
                viewer.played = max(viewer.played, min(played, self.take.frames))
                self._follow_fastest()
                self.seen()
        self._wake()

    def _follow_fastest(self) -> None:
        # Who is ahead must not run dry for one who lags: that one's oldest frames are dropped instead (see Viewer).
        if self.viewers:
            self.played = max(one.played for one in self.viewers)

    def drop_stalled(self) -> None:
        """Gives up viewers that have taken nothing for long: they would keep the session for ever."""
        with self._lock:
            stalled = [viewer for viewer in self.viewers if viewer.stalled_for() > STALLED]
        for viewer in stalled:
            viewer.close("nothing was read for long")
            self.detach(viewer)

    def seen(self) -> None:
        self._last_seen = time.monotonic()

    def idle_for(self) -> float:
        """Seconds since someone watched or asked."""
        return 0.0 if self.viewers else time.monotonic() - self._last_seen

    def changed(self) -> None:
        """Tells all viewers that the state is another."""
        with self._lock:
            for viewer in self.viewers:
                viewer.changed()

    # What viewers ask for

    def ask(self, prompt: str, refresh: str | None = None, at: float | None = None) -> dict:
        """A prompt for the next block, or for the second `at` of the video. Returns its number and, where `at` is
        given, the frame and second that it takes hold at, with the first block that starts there or later.

        Raises Refused for a time that is past, and where too many prompts wait.
        """
        with self._lock:
            take = self.take
            if at is not None:
                latent = take.latent_at(at)
                if latent < take.latents:
                    raise Refused(409, f"second {at:g} is made already, the video has "
                                       f"{take.frames / self.config.fps:.1f} s")
                if len(take.scheduled) >= self.limits.scheduled:
                    raise Refused(429, f"{len(take.scheduled)} prompts are scheduled already")
            self._numbers += 1
            change = Change(prompt, refresh or self.refresh, self._numbers, take.latents if at is None else latent,
                            self._encode(prompt))
            (take.ask if at is None else take.schedule)(change)
            change.embeds.add_done_callback(lambda _: self._wake())
            self.seen()
            frame = None if at is None else take.frame_of(latent)
        self.metrics.prompts.add()
        self.changed()
        self._wake()
        return {"number": change.number, "frame": frame,
                "second": None if frame is None else frame / self.config.fps}

    def cancel(self, number: int) -> None:
        """Takes a prompt back. Raises Refused where none of that number waits."""
        with self._lock:
            if not self.take.cancel(number):
                raise Refused(404, f"no prompt {number} waits")
        self.changed()

    def set(self, *, paused: bool | None = None, endless: bool | None = None, refresh: str | None = None,
            seconds: float | None = None) -> None:
        """Settings that hold from now on; None leaves one as it is."""
        with self._lock:
            self.paused = self.paused if paused is None else paused
            self.endless = self.endless if endless is None else endless
            self.refresh = refresh or self.refresh
            if seconds is not None:
                self.length = max(1, round(seconds * self.config.fps))
            self._asking_since = None
            self.seen()
        self.changed()
        self._wake()

    def restart(self, seed: int | None = None) -> None:
        """A new take with the prompt that was sent last; the recording of the present one is finished.

        Scheduled prompts are dropped: their times were meant for the present take. What the prompt was to do to the
        cache is forgotten too, since a new take's cache is empty.
        """
        with self._lock:
            old, recording = self.take, self.recording
            self._begin(old.seed if seed is None else seed)
            self.failure, self.paused, self._asking_since = "", False, None
            for viewer in self.viewers:
                viewer.played = 0
                viewer.forget_frames()
            if old.wanted is not None:
                self.ask(old.wanted)
        self._output.call(recording.finish)
        self.changed()
        self._wake()

    def video(self) -> Future:
        """The MP4 so far: a future of its Path, or of None where there are no frames."""
        self.seen()
        with self._lock:
            return self._output.call(self.recording.cut)

    def description(self) -> Future:
        """The JSON beside the last MP4 that was asked for: a future of its Path, or None."""
        self.seen()
        with self._lock:
            recording = self.recording

        def path() -> Path | None:
            if not recording.whole:
                recording.cut()
            return recording.path.with_suffix(".json") if recording.whole else None

        return self._output.call(path)

    def close(self, reason: str) -> None:
        """Ends the session; its recording is whole when this returns."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for viewer in self.viewers:
                viewer.close(reason)
            recording = self.recording
        self._output.call(recording.finish)
        self._output.close()
        with self._lock:
            self.take.session = None

    # What viewers are told

    @property
    def status(self) -> str:
        """failed, paused, ended, waiting (for a first prompt), unwatched or generating."""
        if self.failure:
            return "failed"
        if self.ended:
            return "ended"
        if self.paused:
            return "paused"
        if self.take.wanted is None:
            return "waiting"
        return "generating" if self.viewers else "unwatched"

    def state(self, whole: bool = False) -> dict:
        """All that a page shows; with `whole` every prompt so far, else the newest ones."""
        with self._lock:
            take, config = self.take, self.config
            applied = take.applied if whole else take.applied[-SEGMENTS_TOLD:]
            speed = self.block_frames / self.turn_seconds if self.turn_seconds else 0.0
            return {
                "type": "state", "id": self.id, "take": self.take_number, "status": self.status,
                "message": self.failure or self.ended, "seed": take.seed, "refresh": self.refresh,
                "endless": self.endless, "paused": self.paused, "frames": take.frames,
                "seconds": take.frames / config.fps, "length": self.length, "fps": config.fps,
                "width": config.width, "height": config.height, "block_frames": self.block_frames,
                "prompt": take.prompt, "number": take.number,
                "next": {"number": take.next.number, "prompt": take.next.prompt} if take.next else None,
                "prompts": [{"number": number, "prompt": one.prompt, "latent": one.latent, "refresh": one.refresh,
                             "frame": frames_of(one.latent), "second": frames_of(one.latent) / config.fps}
                            for number, one in applied],
                "scheduled": [{"number": one.number, "prompt": one.prompt, "latent": one.latent,
                               "refresh": one.refresh, "second": take.second_of(one.latent)}
                              for one in take.scheduled],
                "frames_per_second": round(speed, 2), "block_seconds": round(self.block_seconds, 4),
                "turn_seconds": round(self.turn_seconds, 4), "viewers": len(self.viewers),
                "recorded": self.recording.frames, "recording": self.recording.failure,
            }


def words_for(error: Exception) -> str:
    """What viewers are told of an error: nothing of the server's files or code."""
    why = "is out of memory" if "out of memory" in str(error).lower() else "failed, its log says why"
    return f"this video can't go on: the server {why}; restart to begin anew"
