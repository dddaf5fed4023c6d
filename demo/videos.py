"""Reads videos back."""

import subprocess
from pathlib import Path

import numpy as np

from demo.canvas import HEIGHT, WIDTH
from utils.video import find_ffmpeg


def read_video(path: str | Path, first: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames of a video of the toy world, uint8 [T, H, W, 3]: all, or so many from frame `first` on.

    Raises ValueError where ffmpeg can't read it.
    """
    pick = f"trim=start_frame={first}" + ("" if frames is None else f":end_frame={first + frames}")
    command = [find_ffmpeg(), "-loglevel", "error", "-i", str(path), "-an",
               "-vf", pick, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{path}: {done.stderr.decode(errors='replace').strip()}")
    return np.frombuffer(bytearray(done.stdout), np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
