"""What stops a video half-way: what was made is kept and plays, the next run makes the rest, and one line says so."""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import inference
import pipeline.render
import utils.interrupts
import utils.video
from pipeline.engine import Engine
from pipeline.session import Session
from tests.conftest import REPOSITORY, Outcome
from tests.frames import decode_errors, read_frames
from utils.cli import guarded
from utils.video import Mp4Writer

BALL = ("--prompt", "a red ball", "--num-output-frames", "12")  # 9, 21, 33, 45 frames after each block
FRAMES = [9, 21, 33, 45]


@pytest.fixture
def videos(tmp_path) -> Path:
    """The folder that the videos of a test go to."""
    return tmp_path / "videos"


@pytest.fixture
def at_block(monkeypatch):
    """at_block(2, act): calls act() when the third block of a video is about to be made."""

    def patch(block: int, act) -> None:
        step = Session.step

        def patched(session: Session):
            if session.block == block:
                act()
            return step(session)

        monkeypatch.setattr(Session, "step", patched)

    return patch


@pytest.fixture
def writers(monkeypatch) -> list[Mp4Writer]:
    """Every Mp4Writer that a test makes."""
    made = []

    class Known(Mp4Writer):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(pipeline.render, "Mp4Writer", Known)
    return made


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - before if "_feed" in thread.name]


def throw(error: BaseException):
    def act(*args, **settings):
        raise error
    return act


def interrupt(*args, **settings) -> None:
    signal.raise_signal(signal.SIGINT)


def description(videos: Path, name: str = "0000-0") -> dict:
    return json.loads((videos / f"{name}.json").read_text("utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_kept(videos: Path, frames: int) -> None:
    """One whole video of so many frames, which says that it is not complete; nothing beside it."""
    assert names(videos) == ["0000-0.json", "0000-0.mp4"]
    assert decode_errors(videos / "0000-0.mp4") == ""
    assert len(read_frames(videos / "0000-0.mp4")) == frames
    about = description(videos)
    assert about["complete"] is False and about["frames"] == frames


def assert_made_by_the_next_run(run_here, videos: Path) -> None:
    """The same command makes the whole video in the same place and leaves nothing beside it."""
    outcome = run_here(inference, *BALL)
    assert outcome.code == 0, outcome.err
    assert names(videos) == ["0000-0.json", "0000-0.mp4"]
    assert len(read_frames(videos / "0000-0.mp4")) == FRAMES[-1] and decode_errors(videos / "0000-0.mp4") == ""
    assert description(videos)["complete"] is True


def assert_interrupted(outcome: Outcome) -> None:
    assert outcome.code == 130, outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("interrupted; run the same command again")
    assert "Traceback" not in outcome.err and "error:" not in outcome.err


# Unexpected errors

def test_exception_shows_its_traceback_and_keeps_the_video(run_here, videos, at_block):
    at_block(2, throw(RuntimeError("a bug")))
    outcome = run_here(inference, *BALL)
    assert outcome.code == 1
    assert "Traceback" in outcome.err and outcome.err.strip().endswith("RuntimeError: a bug")
    assert f"Stopped after 21 of 45 frames; they are in {videos / '0000-0.mp4'}" in outcome.err
    assert_kept(videos, 21)


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "tried to allocate 2.00 gib"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "out of memory;"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory;"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "out of memory;"),
    (MemoryError("Unable to allocate 3 GiB"), "out of memory;"),
    (OSError(12, "Cannot allocate memory"), "out of memory;"),
])
def test_out_of_memory_says_what_to_lower_and_keeps_the_video(run_here, videos, at_block, error, words):
    at_block(2, throw(error))
    line = run_here(inference, *BALL).error_line()
    assert words in line and "lower height and width" in line and "text_encoder_device=cpu" in line
    assert_kept(videos, 21)


def test_file_that_any_part_of_the_program_may_not_read_has_one_line(run_here, videos, at_block):
    at_block(1, throw(PermissionError(13, "Permission denied", "some.file")))
    assert "some.file: Permission denied; allow it" in run_here(inference, *BALL).error_line()
    assert_kept(videos, 9)


def test_video_made_anew_after_a_failure_is_whole(run_here, videos, at_block, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", throw(RuntimeError("a bug")))
        assert run_here(inference, *BALL).code == 1
    assert names(videos) == []
    assert_made_by_the_next_run(run_here, videos)


def test_failure_before_the_first_frame_leaves_nothing(run_here, videos, monkeypatch, writers):
    monkeypatch.setattr(Engine, "session", throw(torch.OutOfMemoryError("CUDA out of memory.")))
    outcome = run_here(inference, *BALL)
    assert "out of memory" in outcome.error_line() and "Stopped after 0 of 45 frames\n" in outcome.err
    assert names(videos) == [] and writers[0]._process is None


# The disk

def test_full_disk_has_one_line(run_here, videos):
    videos.mkdir()
    (videos / "0000-0.partial.mp4").symlink_to("/dev/full")
    outcome = run_here(inference, *BALL)
    assert "0000-0.mp4: ffmpeg stopped: the disk is full; free some space and run" in outcome.error_line()
    assert_made_by_the_next_run(run_here, videos)


def test_description_that_can_not_be_written_keeps_the_video(run_here, videos):
    (videos / "0000-0.json.part").mkdir(parents=True)
    line = run_here(inference, *BALL).error_line()
    assert "0000-0.json: can't be written: Is a directory" in line and "0000-0.mp4 is kept" in line
    assert len(read_frames(videos / "0000-0.mp4")) == 45


def test_description_that_can_not_be_written_does_not_hide_the_failure(run_here, videos, at_block):
    (videos / "0000-0.json.part").mkdir(parents=True)
    at_block(2, throw(RuntimeError("a bug")))
    outcome = run_here(inference, *BALL)
    assert outcome.code == 1 and outcome.err.strip().endswith("RuntimeError: a bug")
    assert "0000-0.json: can't be written" in outcome.err and len(read_frames(videos / "0000-0.mp4")) == 21


# ffmpeg

def wait_for_frames(path: Path, count: int) -> int:
    """Frames of a growing file, once it has `count`."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and path.stat().st_size > 2000 and (frames := len(read_frames(path))) >= count:
            return frames
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {count} frames")


def test_ffmpeg_killed_keeps_a_partial_file_that_plays(run_here, videos, at_block, writers):
    def kill() -> None:
        if len(writers) == 1:
            wait_for_frames(writers[0].partial, 20)
            os.kill(writers[0]._process.pid, signal.SIGKILL)

    at_block(2, kill)
    outcome = run_here(inference, *BALL)
    line = outcome.error_line()
    assert "ffmpeg stopped: it was ended by signal SIGKILL" in line and str(videos / "0000-0.partial.mp4") in line
    assert names(videos) == ["0000-0.partial.mp4"] and len(read_frames(videos / "0000-0.partial.mp4")) >= 20
    assert_made_by_the_next_run(run_here, videos)


def test_failed_overwrite_leaves_the_video_that_is_there(run_here, videos, at_block, writers):
    assert run_here(inference, *BALL).code == 0
    video, about = (videos / "0000-0.mp4").read_bytes(), description(videos)
    at_block(2, lambda: os.kill(writers[-1]._process.pid, signal.SIGKILL))
    run_here(inference, *BALL, "--overwrite").error_line()
    assert (videos / "0000-0.mp4").read_bytes() == video and description(videos) == about


# Interrupts, in this process

def test_interrupt_in_a_block(run_here, videos, monkeypatch):
    with monkeypatch.context() as patch:
        step = Session.step
        patch.setattr(Session, "step", lambda session: interrupt() if session.block == 2 else step(session))
        assert_interrupted(run_here(inference, *BALL))
    assert_kept(videos, 21)
    assert_made_by_the_next_run(run_here, videos)


def test_interrupt_that_a_library_turns_into_another_error(run_here, videos, at_block):
    def library() -> None:
        try:
            interrupt()
        except KeyboardInterrupt:
            raise RuntimeError("trying to pop from empty mode stack") from None

    at_block(2, library)
    assert_interrupted(run_here(inference, *BALL))
    assert_kept(videos, 21)


def test_interrupt_while_ffmpeg_is_waited_for(run_here, videos, monkeypatch):
    monkeypatch.setattr(utils.video, "BLOCKS_WAITING", 0)  # so it waits for room for ever
    monkeypatch.setattr(utils.video.time, "sleep", interrupt)
    assert_interrupted(run_here(inference, *BALL))
    assert names(videos) == []


def test_interrupt_before_the_first_frame(run_here, videos, monkeypatch):
    monkeypatch.setattr(Engine, "session", interrupt)
    assert_interrupted(run_here(inference, *BALL))
    assert names(videos) == []


@pytest.mark.parametrize("owner, name", [(Mp4Writer, "_repack"), (Mp4Writer, "_finish"),
                                         (pipeline.render, "_write_sidecar")])
def test_interrupt_while_a_whole_video_is_finished_comes_after_that(run_here, videos, monkeypatch, owner, name):
    finish = getattr(owner, name)

    def interrupted(*args) -> None:
        interrupt()
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert_interrupted(run_here(inference, *BALL, "--prompt", "a blue cube"))
    assert names(videos) == ["0000-0.json", "0000-0.mp4"] and description(videos)["complete"]
    outcome = run_here(inference, *BALL)
    assert outcome.code == 0 and "0000-0.mp4 is there already, skipped" in outcome.err


@pytest.mark.parametrize("owner, name", [(Mp4Writer, "_repack"), (Mp4Writer, "_finish"),
                                         (pipeline.render, "_write_sidecar")])
def test_second_interrupt_while_a_stopped_video_is_finished(run_here, videos, monkeypatch, at_block, owner, name):
    finish = getattr(owner, name)

    def interrupted(*args) -> None:
        interrupt()
        finish(*args)

    monkeypatch.setattr(owner, name, interrupted)
    at_block(2, interrupt)
    assert_interrupted(run_here(inference, *BALL))
    assert_kept(videos, 21)


def test_interrupt_in_the_second_video_keeps_the_first(run_here, videos, monkeypatch):
    made = []
    session = Engine.session

    def second(engine, *args):
        made.append(args)
        if len(made) == 2:
            interrupt()
        return session(engine, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "session", second)
        assert_interrupted(run_here(inference, *BALL, "--prompt", "a blue cube"))
    assert names(videos) == ["0000-0.json", "0000-0.mp4"] and description(videos)["complete"]
    outcome = run_here(inference, *BALL, "--prompt", "a blue cube")
    assert outcome.code == 0 and "0000-0.mp4 is there already, skipped" in outcome.err
    assert names(videos) == ["0000-0.json", "0000-0.mp4", "0001-0.json", "0001-0.mp4"]


def test_interrupts_that_follow_another_soon_are_dropped(run_here, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(utils.interrupts.time, "monotonic", lambda: clock[0])
    was_interrupted = utils.interrupts.raise_interrupts()
    assert not was_interrupted()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert was_interrupted()
    for _ in range(5):
        clock[0] += 2.5
        interrupt()
    clock[0] += 3.5
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_signal_that_was_switched_off_stays_off(run_here, videos, at_block, monkeypatch):
    """As nohup does with SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_block(2, lambda: signal.raise_signal(signal.SIGHUP))
    assert run_here(inference, *BALL).code == 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert description(videos)["complete"]


# Signals, to a process of its own

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
            time.sleep(120)
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
    context.set_forkserver_preload(["tests.test_failures"])
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
    assert_made_by_the_next_run(run_here, videos)


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
