"""Reads videos back."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from demo.canvas import HEIGHT, WIDTH
from utils.video import find_ffmpeg


def read_video(path: str | Path, first: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames of a video of the toy world, uint8 [T, H, W, 3]: all, or so many from frame `first` on.

    Raises ValueError where ffmpeg can't read it.
    """
    pick = f"trim=start_frame={first}" + ("" if frames is None else f":end_frame={first + frames}")
    # By a file: a pipe is read bit by bit, each of which waits for its turn of an interpreter that other threads use.
    with tempfile.NamedTemporaryFile(suffix=".rgb") as raw:
        command = [find_ffmpeg(), "-y", "-loglevel", "error", "-i", str(path), "-an",
                   "-vf", pick, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", raw.name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"{path}: {done.stderr.decode(errors='replace').strip()}")
        return np.fromfile(raw.name, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
