"""scripts/benchmark_transport.py on a few small frames."""

import numpy as np
import pytest

from scripts.benchmark_transport import BLOCK, BLOCKS, as_h264, as_stills, decode, nearest, toy_frames, video_frames


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return toy_frames(112, 192)[: 3 * BLOCK]


def test_frames_are_larger_where_that_is_asked_for():
    frames = toy_frames(128, 208)
    assert frames.shape == (BLOCK * BLOCKS, 128, 208, 3) and frames.std() > 10


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_stills(frames, kind):
    low, high = (as_stills(frames, kind, quality) for quality in (40, 90))
    assert low["psnr"] < high["psnr"] and low["bytes"] < high["bytes"]
    assert [len(block) for block in high["blocks"]] == [BLOCK] * 3 and len(high["first"]) == len(high["last"]) == 3


def test_h264(frames, tmp_path):
    low, high = (as_h264(frames, crf, 0.3) for crf in (30, 15))
    assert 25 < low["psnr"] < high["psnr"] and low["bytes"] < high["bytes"] < frames.nbytes
    whole = b"".join(part for block in high["blocks"] for part in block)
    assert len(whole) == high["bytes"] and len(decode(whole, frames.shape)) == len(frames)
    (tmp_path / "video.mp4").write_bytes(whole)
    assert video_frames(str(tmp_path / "video.mp4"), 56, 96).shape[1:] == (56, 96, 3)


def test_nearest():
    assert nearest(33.0, (1, 2, 3), lambda setting: {"psnr": 30.0 + setting}) == (3, {"psnr": 33.0})
