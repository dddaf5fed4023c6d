"""What the tests of stopped videos share."""

import json
import time
from pathlib import Path

import inference
from tests.conftest import Outcome
from tests.frames import decode_errors, read_frames

BALL = ("--prompt", "a red ball", "--num-output-frames", "12")  # 9, 21, 33, 45 frames after each block
FRAMES = [9, 21, 33, 45]


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


def assert_made_by_the_next_run(run_here, videos: Path, *beside: str) -> None:
    """The same command makes the whole video in the same place and leaves nothing beside it but the files `beside`."""
    outcome = run_here(inference, *BALL)
    assert outcome.code == 0, outcome.err
    assert names(videos) == sorted(["0000-0.json", "0000-0.mp4", *beside])
    assert len(read_frames(videos / "0000-0.mp4")) == FRAMES[-1] and decode_errors(videos / "0000-0.mp4") == ""
    assert description(videos)["complete"] is True


def assert_interrupted(outcome: Outcome) -> None:
    assert outcome.code == 130, outcome.err
    assert outcome.err.strip().splitlines()[-1] == (
        "interrupted; run the same command again to go on: videos that are whole are skipped, one that was cut off is "
        "made again from its start")
    assert "Traceback" not in outcome.err and "error:" not in outcome.err


def wait_for_frames(path: Path, count: int) -> int:
    """Frames of a growing file, once it has `count`."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and path.stat().st_size > 2000 and (frames := len(read_frames(path))) >= count:
            return frames
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {count} frames")
