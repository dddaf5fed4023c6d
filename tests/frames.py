import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video as a player shows them, uint8 [T, H, W, 3]. Fails where a frame can't be decoded."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def decode_errors(path: Path) -> str:
    """What ffmpeg complains of while it decodes the whole file; nothing for a whole one."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, check=False).stderr.decode()
