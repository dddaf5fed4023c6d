"""Signals to a process that makes a video: what was made is kept and plays, and the next run makes the rest."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import inference
import pipeline.render
from pipeline.session import Session
from tests.conftest import REPOSITORY, Outcome
from tests.frames import decode_errors, read_frames
from tests.stopped import (
    BALL,
    assert_interrupted,
    assert_kept,
    assert_made_by_the_next_run,
    description,
    names,
    wait_for_frames,
)
from utils.cli import guarded
from utils.video import Mp4Writer


def _run_and_pause(argv: list[str], folder: Path, block: int) -> None:
    """In another process: inference.py that stops to think before block `block`, and says so in `paused`, which has the
    id of its ffmpeg."""
    errors = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    writers, step = [], Session.step

    class Known(Mp4Writer):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            writers.append(self)

    def pause(session: Session):
        if session.block == block:
            (folder / "paused.part").write_text(str(writers[0]._process.pid))
            (folder / "paused.part").rename(folder / "paused")
            # In short naps, as work is done in many calls. One call that waits can sleep through a signal: where two
            # come at once, the system may hand both to another thread, which has Python's handlers wait for this one.
            for _ in range(6000):
                time.sleep(0.02)
        return step(session)

    pipeline.render.Mp4Writer, Session.step = Known, pause
    sys.exit(guarded(lambda: inference.main(argv)))


class Paused:
    """A process that makes a video and has paused: its id, its ffmpeg's, and what came of it."""

    def __init__(self, server, argv: list[str], folder: Path, block: int):
        self.folder = folder
        self.process = server.Process(target=_run_and_pause, args=(argv, folder, block))
        self.process.start()
        end = time.monotonic() + 90
        while not (folder / "paused").exists():
            assert self.process.is_alive() and time.monotonic() < end, (folder / "stderr").read_text()
            time.sleep(0.02)
        self.id, self.ffmpeg = self.process.pid, int((folder / "paused").read_text())

    def end(self) -> Outcome:
        """Waits for its end; an exit code below 0 is the signal that ended it."""
        self.process.join(60)
        assert not self.process.is_alive()
        return Outcome(self.process.exitcode, "", (self.folder / "stderr").read_text())


@pytest.fixture(scope="module")
def server():
    """A process that has everything imported; what it forks is a process of its own without the seconds of a start."""
    context, before = multiprocessing.get_context("forkserver"), Path.cwd()
    context.set_forkserver_preload(["tests.test_signals"])
    os.chdir(REPOSITORY)  # where it finds that
    multiprocessing.forkserver.ensure_running()
    os.chdir(before)
    return context


@pytest.fixture
def paused(server, tiny_yaml, tmp_path):
    """paused(2) → a process that has written two blocks of a video and thinks about the third."""
    started = []

    def start(block: int) -> Paused:
        started.append(Paused(server, [str(tiny_yaml), *BALL], tmp_path, block))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.ffmpeg, signal.SIGKILL)


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 2,
                                     [signal.SIGINT, signal.SIGTERM], [signal.SIGINT] * 20])
def test_signals_stop_the_work_and_keep_the_video(paused, run_here, videos, signals):
    process = paused(2)
    wait_for_frames(videos / "0000-0.partial.mp4", 20)
    for number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.id, number)
        time.sleep(0.002 * (len(signals) > 2))
    assert_interrupted(process.end())
    assert_kept(videos, 21)
    assert_made_by_the_next_run(run_here, videos)


def test_signal_before_the_first_frame_leaves_nothing(paused, videos):
    process = paused(0)
    os.kill(process.id, signal.SIGINT)
    assert_interrupted(process.end())
    assert names(videos) == []


def test_ctrl_c_in_the_terminal_does_not_reach_ffmpeg(paused):
    """A terminal sends it to the whole process group."""
    process = paused(1)
    assert os.getpgid(process.ffmpeg) != os.getpgid(process.id)


@pytest.mark.parametrize("both", [False, True])
def test_killed_process_leaves_a_partial_file_that_plays(paused, run_here, videos, both):
    process = paused(2)
    wait_for_frames(videos / "0000-0.partial.mp4", 20)
    for victim in [process.id, process.ffmpeg] if both else [process.id]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    assert process.end().code == -signal.SIGKILL
    assert wait_for_frames(videos / "0000-0.partial.mp4", 20 if both else 21) <= 21
    assert names(videos) == ["0000-0.partial.mp4"]
    frames = read_frames(videos / "0000-0.partial.mp4")
    other = run_here(inference, "--prompt", "a blue cube", "--num-output-frames", "3")
    assert other.code == 0 and f"kept as {videos / '0000-0-cut.mp4'}" in other.err
    np.testing.assert_array_equal(read_frames(videos / "0000-0-cut.mp4"), frames)
    assert len(read_frames(videos / "0000-0.mp4")) == 9
    assert names(videos) == ["0000-0-cut.mp4", "0000-0.json", "0000-0.mp4"]


def test_another_run_of_the_same_video_is_refused_while_one_makes_it(paused, run_here, videos):
    process = paused(2)
    assert "another run is writing it" in run_here(inference, *BALL).error_line()
    os.kill(process.id, signal.SIGINT)
    process.end()
    assert_kept(videos, 21)


def test_ctrl_c_in_the_script_itself(tiny_yaml, tmp_path, videos):
    """With no part replaced: the interpreter ends by itself, and at once."""
    command = [sys.executable, str(REPOSITORY / "inference.py"), str(tiny_yaml), "--prompt", "a red ball",
               "--num-output-frames", "3000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for_frames(videos / "0000-0.partial.mp4", 9)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert_interrupted(Outcome(process.returncode, "", errors))
    assert names(videos) == ["0000-0.json", "0000-0.mp4"] and decode_errors(videos / "0000-0.mp4") == ""
    about = description(videos)
    assert about["complete"] is False and about["frames"] == len(read_frames(videos / "0000-0.mp4")) >= 9
