"""What stops a video half-way: what was made is kept and plays, the next run makes the rest, and one line says so."""

import os
import signal
import threading

import pytest
import torch

import inference
import pipeline.render
import utils.interrupts
import utils.video
from pipeline.engine import Engine
from pipeline.session import Session
from tests.frames import read_frames
from tests.stopped import (
    BALL,
    assert_interrupted,
    assert_kept,
    assert_made_by_the_next_run,
    description,
    names,
    wait_for_frames,
)
from utils.video import Mp4Writer


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
    assert_made_by_the_next_run(run_here, videos, "0000-0-cut.mp4")


def test_failed_overwrite_leaves_the_video_that_is_there(run_here, videos, at_block, writers):
    assert run_here(inference, *BALL).code == 0
    video, about = (videos / "0000-0.mp4").read_bytes(), description(videos)
    at_block(2, lambda: os.kill(writers[-1]._process.pid, signal.SIGKILL))
    run_here(inference, *BALL, "--overwrite").error_line()
    assert (videos / "0000-0.mp4").read_bytes() == video and description(videos) == about


# A run that stops earlier than the one before it

@pytest.mark.parametrize("first, options, code", [(3, [], 130), (None, ["--overwrite"], 0)])
def test_video_that_is_longer_stays(run_here, videos, monkeypatch, first, options, code):
    """After a Ctrl-C, and where a whole video is made again."""
    step = Session.step

    def stop_before(block: int | None) -> None:
        monkeypatch.setattr(Session, "step",
                            lambda session: interrupt() if session.block == block else step(session))

    stop_before(first)
    assert run_here(inference, *BALL).code == code
    before = (videos / "0000-0.mp4").read_bytes(), description(videos)
    stop_before(1)
    outcome = run_here(inference, *BALL, *options)
    assert_interrupted(outcome)
    had = before[1]["frames"]
    assert had > 9 and f"Stopped after 9 of 45 frames; {videos / '0000-0.mp4'} keeps the {had} it had" in outcome.err
    assert ((videos / "0000-0.mp4").read_bytes(), description(videos)) == before
    assert names(videos) == ["0000-0.json", "0000-0.mp4"]
    stop_before(None)
    assert run_here(inference, *BALL, *options).code == 0 and description(videos)["complete"] is True


def test_video_that_is_shorter_is_replaced(run_here, videos, monkeypatch):
    step, blocks = Session.step, [1, 3]
    monkeypatch.setattr(Session, "step", lambda session: interrupt() if session.block == blocks[0] else step(session))
    for frames in (9, 33):
        assert_interrupted(run_here(inference, *BALL))
        assert_kept(videos, frames)
        blocks.pop(0)


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
                                         (pipeline.render, "write_sidecar")])
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
                                         (pipeline.render, "write_sidecar")])
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
