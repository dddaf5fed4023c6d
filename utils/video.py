import contextlib
import fcntl
import itertools
import logging
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

import imageio_ffmpeg
import numpy as np

from utils.errors import UserError
from utils.interrupts import held

log = logging.getLogger(__name__)

BLOCKS_WAITING = 4  # written but not yet taken by ffmpeg
POLL = 0.005  # seconds between two looks at whether ffmpeg has taken one

# Every frame is encoded and written as it comes: no look-ahead, one MP4 fragment a frame. What is on disk can be
# played at any moment, and the first frames of a video do not depend on how it goes on.
ENCODER = ["-c:v", "libx264", "-preset", "medium", "-tune", "zerolatency", "-pix_fmt", "yuv420p"]
FRAGMENTS = ["-movflags", "+frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1", "-f", "mp4"]
# RGB → BT.709, and said so in the file: players guess otherwise, and guess differently.
COLOURS = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
           "-color_trc", "bt709", "-color_range", "tv"]


class Mp4Writer:
    """Writes frames to an H.264 MP4 while they are made.

        with Mp4Writer("ball.mp4", width=832, height=480) as video:
            video.write(frames)      # uint8 [T, H, W, 3]

    Until it is closed the video is NAME.partial.mp4, playable up to the last frame written, also after a kill; then it
    is re-packed for seeking and takes its name. Leaving the `with` by an exception closes it too, so nothing is lost.
    One that a killed run left is first renamed to NAME-cut.mp4.
    """

    def __init__(self, path: str | Path, *, width: int, height: int, fps: int = 16, crf: int = 18, at_least: int = 0):
        """Opens the file. Raises UserError where it can't be written, or another process is writing it.

        at_least: with fewer frames than these the file that has the name keeps it, and the new one is removed.
        """
        self.path, self._at_least = Path(path), at_least
        self.partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self.file: Path | None = self.partial  # where the frames are; None where there are none
        self.frames = 0  # handed to ffmpeg
        self.seconds = 0.0  # that ffmpeg took for them
        self._shape = (height, width, 3)
        self._process: subprocess.Popen | None = None
        self._ffmpeg = find_ffmpeg()
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
        command = [self._ffmpeg, "-y", "-loglevel", "error", *source, "-an", *COLOURS, *ENCODER, "-crf", str(crf),
                   "-g", str(2 * fps), *FRAGMENTS, str(self.partial.resolve())]
        try:
            with held():
                self._start(command)
        except KeyboardInterrupt:
            self.close()
            raise

    def _start(self, command: list[str]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _open_locked(self.partial)
            if self.partial.is_file() and self.partial.stat().st_size:
                leftover = self._lock
                kept = _set_aside(self.partial, self.path)
                self._lock = _open_locked(self.partial)
                leftover.close()
                log.warning("%s was left by a run that was killed; kept as %s", self.partial, kept)
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the writer
        except OSError as error:
            raise UserError(f"{error.filename or self.path}: can't be written: {error.strerror}; choose another "
                            f"--output-folder") from None
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
                start_new_session=True,  # Ctrl-C in the terminal is for us; ffmpeg then finishes the file
            )
        except OSError as error:
            self._drop_empty()
            raise UserError(f"{self._ffmpeg}: can't be run: {error.strerror}; mend it, or name another ffmpeg in "
                            f"IMAGEIO_FFMPEG_EXE") from None
        self._broken = False
        # No bound: what waits for room is polled for. A Ctrl-C while a bounded queue blocks can leave it locked.
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def write(self, frames) -> None:
        """Appends frames, uint8 [T, H, W, 3] (tensor or array on the host, not to be changed afterwards). They are
        encoded in the background; a few blocks may wait, then this waits too.

        Raises ValueError for another shape or type, UserError where ffmpeg has stopped (disk full, killed).
        """
        array = np.ascontiguousarray(frames)
        if array.ndim != 4 or array.shape[1:] != self._shape or array.dtype != np.uint8:
            raise ValueError(f"frames are {array.dtype} {list(array.shape)}, the video needs uint8 "
                             f"[T, {', '.join(map(str, self._shape))}]")
        if self._process is None:
            raise ValueError(f"{self.path} is closed")
        while self._queue.qsize() >= BLOCKS_WAITING and not self._broken:
            time.sleep(POLL)
        if self._broken:
            self._raise_failure()
        if len(array):
            self._queue.put(array)

    def _feed(self) -> None:
        """The thread that hands frames to ffmpeg."""
        while (array := self._queue.get()) is not None:
            start = time.perf_counter()
            try:
                if not self._broken:
                    self._process.stdin.write(memoryview(array).cast("B"))
                    self._process.stdin.flush()
                    self.frames += len(array)
            except OSError:
                self._broken = True
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Finishes the file and gives it its name; one without frames is removed. A Ctrl-C waits for that.

        Raises UserError where ffmpeg failed.
        """
        with held():
            if self._process is not None:
                self._finish()

    def _finish(self) -> None:
        start = time.perf_counter()
        self._queue.put(None)
        self._thread.join()
        self.seconds += time.perf_counter() - start
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() != 0 or self._broken:
            self._raise_failure()
        self._process = None
        self._errors.close()
        try:
            if self.frames >= max(1, self._at_least):
                self._repack()
                self.file = self.path
            else:
                self.partial.unlink()
                self.file = None
        except OSError as error:
            raise UserError(f"{self.path}: can't be written: {error.strerror}; the video is in "
                            f"{self.partial}") from None
        finally:
            self._lock.close()

    def _repack(self) -> None:
        """Moves the index to the front, so that browsers seek at once. The fragmented file stands in if that fails."""
        whole = self.path.with_name(f"{self.path.name}.part")
        command = [self._ffmpeg, "-y", "-loglevel", "error", "-i", str(self.partial.resolve()), "-c", "copy",
                   "-movflags", "+faststart", "-f", "mp4", str(whole.resolve())]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True,
                              check=False)
        if done.returncode == 0:
            whole.replace(self.path)
            self.partial.unlink()
        else:
            whole.unlink(missing_ok=True)
            self.partial.replace(self.path)

    def _raise_failure(self) -> None:
        process, self._process = self._process, None
        self._queue.put(None)
        self._thread.join()
        with contextlib.suppress(OSError):
            process.stdin.close()
        code = process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        self._lock.close()
        self._drop_empty()
        reason, mend = _describe(code, lines)
        kept = f"; what was made so far is in {self.file}" if self.file else ""
        raise UserError(f"{self.path}: ffmpeg stopped: {reason}{kept}; {mend}run the same command again")

    def _drop_empty(self) -> None:
        if not self.partial.exists() or self.partial.stat().st_size == 0:
            self.partial.unlink(missing_ok=True)
            self.file = None

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except UserError:
            if error is None:
                raise


def find_ffmpeg() -> str:
    """The ffmpeg program: that of IMAGEIO_FFMPEG_EXE, of the imageio-ffmpeg package or of the system.

    Raises UserError where there is none.
    """
    try:
        found = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise UserError("no ffmpeg here; install imageio-ffmpeg, or ffmpeg itself") from None
    if shutil.which(found) is None:
        raise UserError(f"IMAGEIO_FFMPEG_EXE={found}: no such program; unset it, or give the path of an ffmpeg")
    return found


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file to append to it and keeps other runs off it until it is closed. Raises UserError where another has
    it."""
    while True:
        file = path.open("ab")
        if not path.is_file():  # a device, which may have many writers
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{path}: another run is writing it; wait for that one, or choose another "
                            f"--output-folder") from None
        except OSError:
            return file  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # another run gave it its name since it was opened


def _set_aside(partial: Path, path: Path) -> Path:
    """Gives the partial file of a video `path` a free name of its own, and returns that."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.stem}-cut.mp4" if number == 1 else f"{path.stem}-cut-{number}.mp4")
        if kept.with_suffix(".json").exists():
            continue
        try:
            kept.open("xb").close()  # the name is ours, whoever else looks for one
        except FileExistsError:
            continue
        partial.replace(kept)
        return kept
    raise AssertionError("unreachable")


def _describe(code: int, lines: list[str]) -> tuple[str, str]:
    """Why ffmpeg ended, from its exit code and what it said, and what to do before it is run again."""
    if any("No space left" in line for line in lines):
        return "the disk is full", "free some space and "
    if code < 0:
        return f"it was ended by signal {signal.Signals(-code).name}", ""
    return (lines[-1] if lines else f"exit code {code}"), "mend that and "


def check_writable(folder: Path, option: str = "--output-folder") -> None:
    """Raises UserError, which names the option that said `folder`, where no file can be made in it; makes the
    folder."""
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "that is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{option}: can't write in {folder}: {reason}; choose another place") from None
