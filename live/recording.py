import logging
import subprocess
import tempfile
import time
from pathlib import Path

from torch import Tensor

from live.storage import Storage
from live.take import Take
from pipeline.render import Job, request_of, write_sidecar
from pipeline.timeline import Timeline
from utils.errors import UserError
from utils.report import VideoTimes
from utils.video import Mp4Writer, find_ffmpeg

log = logging.getLogger(__name__)

LOOK_EVERY = 20  # blocks between two looks at the disk


class Recording:
    """All frames of one take as an MP4, with its description as JSON beside it; whole at any moment that `cut` is
    called, and after `finish`. For one thread.

    What stops a recording (a full disk, ffmpeg killed) does not stop the take: `failure` says it, in words for viewers.
    asked: what the video is to show where its length is known; it is complete only once it has all of that. A live take
    has no length, so what there is of it is complete.
    """

    def __init__(self, take: Take, storage: Storage, weights: dict[str, str], kind: str = "live",
                 asked: Timeline | None = None):
        self.take, self.storage, self.weights, self.asked = take, storage, weights, asked
        self.path = storage.new(kind)
        self.failure = ""
        self.whole = 0  # frames in the file at `path`
        self._writer: Mp4Writer | None = None
        self._given = 0  # frames written or being written
        self._blocks = 0
        self._encoding = 0.0  # seconds
        self._began = time.monotonic()

    @property
    def frames(self) -> int:
        return self._given

    def write(self, frames: Tensor) -> None:
        """Appends frames, uint8 [T, H, W, 3]."""
        if self.failure:
            return
        try:
            if self._blocks % LOOK_EVERY == 0 and not self.storage.make_room():
                raise _Full
            if self._writer is None:
                self._writer = self._open()
            self._writer.write(frames)
            self._given += len(frames)
            self._blocks += 1
        except _Full:
            self._stop("recordings take all the space that this server gives them")
        except (UserError, OSError) as error:
            self._failed(error)

    def cut(self) -> Path | None:
        """Makes the file whole, all frames so far in it; recording goes on after it. None where there are no frames."""
        self._close()
        return self.path if self.whole else None

    def finish(self) -> None:
        """The last cut; the file may go when room is needed."""
        self._close()
        self.storage.release(self.path)

    def _open(self) -> Mp4Writer:
        config = self.take.config
        path = self.path.with_name(f"{self.path.stem}.next.mp4") if self.whole else self.path
        return Mp4Writer(path, width=config.width, height=config.height, fps=config.fps, crf=config.crf)

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
            if writer.file is not None and writer.path != self.path:
                _join(self.path, writer.path)
            self.whole += writer.frames
            self._encoding += writer.seconds
            self._describe()
        except (UserError, OSError) as error:
            if writer.file == self.path:
                self.whole = writer.frames
            self._failed(error)

    def _describe(self) -> None:
        made = self.take.timeline(self.whole)
        timeline = self.asked or made
        config = self.take.config
        request = request_of(timeline, self.take.seed, 0, config, self.weights)
        session = self.take.session
        stages = {**session.watch.read(), "encode": [self._encoding]} if session else {}
        times = VideoTimes(self.path.stem, self.whole, made.latents, time.monotonic() - self._began, stages)
        write_sidecar(Job(self.path, timeline, self.take.seed, 0, request), times, config,
                      complete=self.whole == timeline.frames)

    def _failed(self, error: Exception) -> None:
        log.warning("Recording %s stops: %s", self.path.stem, error)
        full = "disk is full" in str(error) or "No space left" in str(error)
        self._stop("the disk is full" if full else "its file can't be written, the server's log says why")

    def _stop(self, reason: str) -> None:
        self.failure = f"recording stopped: {reason}"
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
            if writer.path == self.path and writer.file is not None:
                writer.file.replace(self.path)  # where ffmpeg failed, the part that it wrote; it plays
                self.whole = writer.frames
        except (UserError, OSError) as error:
            log.warning("%s", error)


class _Full(Exception):
    """No room for recordings."""


def _join(whole: Path, rest: Path) -> None:
    """Appends `rest` to `whole`, which is replaced only once that is done. Raises OSError where it fails."""
    joined = whole.with_name(f"{whole.name}.part")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listing:
        for path in (whole, rest):
            quoted = str(path.resolve()).replace("'", "'\\''")
            listing.write(f"file '{quoted}'\n")
        listing.flush()
        command = [find_ffmpeg(), "-y", "-loglevel", "error", "-f", "concat", "-safe", "0", "-i", listing.name,
                   "-c", "copy", "-movflags", "+faststart", "-f", "mp4", str(joined.resolve())]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True,
                              check=False)
    if done.returncode != 0:
        joined.unlink(missing_ok=True)
        raise OSError(f"{rest.name} could not be joined to {whole.name}: "
                      f"{done.stderr.decode(errors='replace').strip()}")
    joined.replace(whole)
    rest.unlink()
