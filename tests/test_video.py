"""Mp4Writer: what it writes, what it refuses, and what is left where it fails."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.frames import decode_errors, read_frames
from utils.errors import UserError
from utils.video import Mp4Writer, check_writable, find_ffmpeg

HEIGHT, WIDTH = 32, 48


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)


def writer(path: Path, **settings) -> Mp4Writer:
    return Mp4Writer(path, width=WIDTH, height=HEIGHT, **settings)


def child(video: Mp4Writer) -> int:
    """The id of the ffmpeg that a writer runs."""
    return video._process.pid


def boxes(path: Path) -> list[str]:
    """The names of an MP4's outermost boxes, in order."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        names.append(name.decode())
        at += size
    return names


@pytest.mark.parametrize("blocks", [[1], [9, 12], [9, 12, 5], [1, 1, 1]])
def test_every_frame_is_kept(tmp_path, blocks):
    with writer(tmp_path / "a.mp4") as video:
        for index, count in enumerate(blocks):
            video.write(noise(count, index))
    assert len(read_frames(tmp_path / "a.mp4")) == sum(blocks) == video.frames
    assert decode_errors(tmp_path / "a.mp4") == ""
    assert video.file == tmp_path / "a.mp4" and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_format_is_one_that_every_player_knows(tmp_path):
    with writer(tmp_path / "a.mp4", fps=16) as video:
        video.write(noise(20))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4")]
    about = subprocess.run(command, capture_output=True, check=False).stderr.decode()
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709.*\b48x32\b.*\b16 fps", about), about
    assert "Duration: 00:00:01.25" in about
    names = boxes(tmp_path / "a.mp4")
    assert names[0] == "ftyp" and names.index("moov") < names.index("mdat") and "moof" not in names


def test_frame_rate_and_quality_are_those_asked_for(tmp_path):
    for name, settings in {"good": {"fps": 24, "crf": 1}, "bad": {"fps": 24, "crf": 45}}.items():
        with writer(tmp_path / f"{name}.mp4", **settings) as video:
            video.write(noise(24))
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "good.mp4")))["fps"] == 24
    assert (tmp_path / "good.mp4").stat().st_size > 4 * (tmp_path / "bad.mp4").stat().st_size


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_colours_survive(tmp_path, colour):
    with writer(tmp_path / "a.mp4") as video:
        video.write(np.full((3, HEIGHT, WIDTH, 3), colour, np.uint8))
    assert np.abs(read_frames(tmp_path / "a.mp4").astype(int) - colour).max() <= 4


def test_tensors_and_arrays_with_strides_are_written_as_they_look(tmp_path):
    frames = noise(2)
    for name, same in {"array": frames, "tensor": torch.from_numpy(frames),
                       "strided": np.asfortranarray(frames)}.items():
        with writer(tmp_path / f"{name}.mp4") as video:
            video.write(same)
    assert (tmp_path / "array.mp4").read_bytes() == (tmp_path / "tensor.mp4").read_bytes()
    assert (tmp_path / "array.mp4").read_bytes() == (tmp_path / "strided.mp4").read_bytes()


@pytest.mark.parametrize("frames, words", [
    (np.zeros((2, HEIGHT, WIDTH, 4), np.uint8), r"uint8 \[2, 32, 48, 4\]"),
    (np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"uint8 \[32, 48, 3\]"),
    (np.zeros((2, WIDTH, HEIGHT, 3), np.uint8), r"uint8 \[2, 48, 32, 3\]"),
    (np.zeros((2, HEIGHT, WIDTH, 3), np.float32), r"float32 \[2, 32, 48, 3\]"),
])
def test_frames_of_another_kind_are_refused_and_the_video_goes_on(tmp_path, frames, words):
    with writer(tmp_path / "a.mp4") as video:
        with pytest.raises(ValueError, match=rf"{words}, the video needs uint8 \[T, 32, 48, 3\]"):
            video.write(frames)
        video.write(noise(2))
    assert len(read_frames(tmp_path / "a.mp4")) == 2


def test_write_after_close_is_refused_and_close_again_does_nothing(tmp_path):
    video = writer(tmp_path / "a.mp4")
    video.write(noise(1))
    video.close()
    video.close()
    with pytest.raises(ValueError, match="closed"):
        video.write(noise(1))
    assert len(read_frames(tmp_path / "a.mp4")) == 1


@pytest.mark.parametrize("blocks", [[], [0]])
def test_no_frames_leave_no_file(tmp_path, blocks):
    with writer(tmp_path / "a.mp4") as video:
        for count in blocks:
            video.write(noise(count))
    assert video.file is None and list(tmp_path.iterdir()) == []


def test_exception_in_the_body_keeps_the_frames(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), writer(tmp_path / "a.mp4") as video:
        video.write(noise(9))
        raise RuntimeError("mine")
    assert len(read_frames(tmp_path / "a.mp4")) == 9 and boxes(tmp_path / "a.mp4")[1] == "moov"


def test_what_is_written_can_be_played_before_the_end(tmp_path):
    with writer(tmp_path / "a.mp4") as video:
        for index in range(3):
            video.write(noise(12, index))
        frames = wait_for_frames(video.partial, 35)
    assert (read_frames(tmp_path / "a.mp4")[: len(frames)] == frames).all()


def wait_for_frames(path: Path, count: int) -> np.ndarray:
    """Frames of a growing file, once it has `count`."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and path.stat().st_size > 2000:
            frames = read_frames(path)
            if len(frames) >= count:
                return frames
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {count} frames")


def test_a_slow_ffmpeg_makes_the_writer_wait_not_grow(tmp_path):
    with writer(tmp_path / "a.mp4") as video:
        os.kill(child(video), signal.SIGSTOP)
        written = []

        def write_all() -> None:
            for index in range(60):
                video.write(noise(12, index))
                written.append(index)

        thread = threading.Thread(target=write_all)
        thread.start()
        thread.join(1)
        waiting = len(written)
        os.kill(child(video), signal.SIGCONT)
        thread.join(60)
    assert waiting < 40 and len(written) == 60
    assert len(read_frames(tmp_path / "a.mp4")) == 720


@pytest.mark.parametrize("when", ["write", "close"])
def test_ffmpeg_killed(tmp_path, when):
    video = writer(tmp_path / "a.mp4")
    video.write(noise(12))
    wait_for_frames(video.partial, 11)
    os.kill(child(video), signal.SIGKILL)
    with pytest.raises(UserError) as error:
        while when == "write":
            video.write(noise(12))
        video.close()
    message = str(error.value)
    assert "SIGKILL" in message and str(video.partial) in message and "run the same command again" in message
    assert "\n" not in message
    assert len(read_frames(video.partial)) >= 11 and video.file == video.partial and not (tmp_path / "a.mp4").exists()
    video.close()  # nothing more to say


def test_ffmpeg_killed_while_an_exception_is_on_its_way_does_not_hide_it(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), writer(tmp_path / "a.mp4") as video:
        video.write(noise(12))
        os.kill(child(video), signal.SIGKILL)
        raise RuntimeError("mine")


def test_ffmpeg_that_gives_up_is_quoted_and_leaves_no_empty_file(tmp_path, monkeypatch):
    program(tmp_path / "ffmpeg", "#!/bin/sh\necho first >&2\necho Unknown encoder libx264 >&2\nexit 8\n", monkeypatch)
    with pytest.raises(UserError, match="ffmpeg stopped: Unknown encoder libx264; mend that and run"), \
            writer(tmp_path / "videos/a.mp4") as video:
        for _ in range(100):
            video.write(noise(60))
    assert list((tmp_path / "videos").iterdir()) == [] and video.file is None


def test_ffmpeg_that_can_not_run_leaves_no_empty_file(tmp_path, monkeypatch):
    program(tmp_path / "ffmpeg", "\0", monkeypatch)
    with pytest.raises(UserError, match="ffmpeg: can't be run: "):
        writer(tmp_path / "videos/a.mp4")
    assert list((tmp_path / "videos").iterdir()) == []


def program(path: Path, contents: str, monkeypatch) -> None:
    """A program that is taken for ffmpeg."""
    path.write_text(contents)
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


def test_full_disk(tmp_path):
    (tmp_path / "a.partial.mp4").symlink_to("/dev/full")
    with pytest.raises(UserError) as error, writer(tmp_path / "a.mp4") as video:
        for index in range(100):
            video.write(noise(12, index))
    assert "the disk is full; free some space" in str(error.value) and video.file is None  # nothing fitted


FILL_A_DISK = """
    import os, subprocess, sys
    import numpy as np
    folder = sys.argv[1]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], check=True)
    from utils.errors import UserError
    from utils.video import Mp4Writer
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), np.uint8)
    try:
        with Mp4Writer(folder + "/a.mp4", width=48, height=32) as video:
            for _ in range(100):
                video.write(frames)
    except UserError as error:
        print(error)
        os.system(f"cp {folder}/* {sys.argv[2]}")
"""


def test_full_disk_keeps_what_fitted(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "kept").mkdir()
    script = [sys.executable, "-c", textwrap.dedent(FILL_A_DISK), str(tmp_path / "small"), str(tmp_path / "kept")]
    if shutil.which("unshare") is None or subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(tmp_path / "small")],
            capture_output=True, check=False).returncode:
        pytest.skip("can't mount a small disk here")
    done = subprocess.run(["unshare", "--mount", *script], cwd=REPOSITORY, capture_output=True, check=False)
    message = done.stdout.decode()
    assert "the disk is full" in message and "small/a.partial.mp4" in message, message + done.stderr.decode()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a.partial.mp4"]
    assert len(read_frames(tmp_path / "kept/a.partial.mp4")) > 24


def test_full_disk_at_the_very_end_leaves_the_video_as_it_is(tmp_path, monkeypatch):
    """Re-packing needs as much room again; where it fails, the file that is there is the video."""
    video = writer(tmp_path / "a.mp4")
    video.write(noise(12))
    (tmp_path / "a.mp4.part").symlink_to("/dev/full")
    video.close()
    assert video.file == tmp_path / "a.mp4" and len(read_frames(tmp_path / "a.mp4")) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_name_that_is_taken_by_a_folder_keeps_the_partial_file(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    video = writer(tmp_path / "a.mp4")
    video.write(noise(12))
    with pytest.raises(UserError, match=r"a\.mp4: can't be written: .* the video is in .*a\.partial\.mp4"):
        video.close()
    assert len(read_frames(video.partial)) == 12


@pytest.mark.parametrize("path", ["file/a.mp4", "file/b/a.mp4", "taken.mp4"])
def test_place_that_can_not_be_written(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.partial.mp4").mkdir()
    with pytest.raises(UserError, match=r"can't be written: .* choose another"):
        writer(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_writers_never_share_a_file(tmp_path):
    with writer(tmp_path / "a.mp4") as video:
        video.write(noise(12))
        with pytest.raises(UserError, match="another run is writing it"):
            writer(tmp_path / "a.mp4")
        video.write(noise(12))
    assert len(read_frames(tmp_path / "a.mp4")) == 24
    with writer(tmp_path / "a.mp4") as video:
        video.write(noise(1))
    assert len(read_frames(tmp_path / "a.mp4")) == 1


def test_what_a_killed_run_left_gets_a_name_of_its_own(tmp_path, caplog):
    for count in (2, 3):
        with writer(tmp_path / "left.mp4") as video:
            video.write(noise(count))
        (tmp_path / "left.mp4").rename(tmp_path / "a.partial.mp4")
        (tmp_path / "a-cut.json").touch()  # a name that another video has
        with writer(tmp_path / "a.mp4") as video:
            video.write(noise(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cut-2.mp4", "a-cut-3.mp4", "a-cut.json", "a.mp4"]
    assert [len(read_frames(tmp_path / name)) for name in ("a-cut-2.mp4", "a-cut-3.mp4", "a.mp4")] == [2, 3, 1]
    assert f"a.partial.mp4 was left by a run that was killed; kept as {tmp_path / 'a-cut-2.mp4'}" in caplog.text


def test_file_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    video = writer(tmp_path / "a.mp4")
    video.write(noise(2))
    repack = video._repack

    def meanwhile() -> None:
        with pytest.raises(UserError, match="another run is writing it"):
            writer(tmp_path / "a.mp4")
        repack()

    monkeypatch.setattr(video, "_repack", meanwhile)
    video.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and len(read_frames(tmp_path / "a.mp4")) == 2


@pytest.mark.parametrize("frames, kept", [(1, 2), (2, 2), (3, 3)])
def test_a_longer_video_keeps_its_name(tmp_path, frames, kept):
    with writer(tmp_path / "a.mp4") as video:
        video.write(noise(2))
    with writer(tmp_path / "a.mp4", at_least=2) as video:
        video.write(noise(frames))
    assert len(read_frames(tmp_path / "a.mp4")) == kept and video.file == (video.path if frames >= 2 else None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_ffmpeg_that_is_not_there_or_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"IMAGEIO_FFMPEG_EXE=.*nothing: no such program"):
        writer(tmp_path / "videos/a.mp4")
    assert not (tmp_path / "videos").exists()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    with pytest.raises(UserError, match="install imageio-ffmpeg"):
        find_ffmpeg()


def test_interrupt_while_a_file_is_closed_comes_after_it(tmp_path, monkeypatch):
    video = writer(tmp_path / "a.mp4")
    video.write(noise(12))
    repack = video._repack

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        repack()

    monkeypatch.setattr(video, "_repack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.close()
    assert video.file == tmp_path / "a.mp4" and boxes(tmp_path / "a.mp4")[1] == "moov"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_while_a_file_is_opened_leaves_none(tmp_path, monkeypatch):
    start = Mp4Writer._start

    def interrupted(video: Mp4Writer, command: list[str]) -> None:
        start(video, command)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Mp4Writer, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_writer_closes_in_any_thread(tmp_path):
    def make() -> None:
        with writer(tmp_path / "a.mp4") as video:
            video.write(noise(3))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(30)
    assert len(read_frames(tmp_path / "a.mp4")) == 3


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new/folder")
    assert list((tmp_path / "new/folder").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--profile: can't write in .*file: that is a file"):
        check_writable(tmp_path / "file", "--profile")
    with pytest.raises(UserError, match=r"--output-folder: can't write in .*file/below"):
        check_writable(tmp_path / "file/below")
