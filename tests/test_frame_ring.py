"""FrameRing against a list of frames for each convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wan.frame_ring import HISTORY, FrameRing


@given(st.integers(1, 8), st.integers(2, 6), st.integers(1, 6), st.integers(0, 12))
def test_every_convolution_sees_its_own_last_frames(convolutions, room, first, rounds):
    ring = FrameRing(convolutions, room, torch.empty(2, 1, 1, 1, 3))
    pasts = [torch.zeros(2, HISTORY, 1, 1, 3) for _ in range(convolutions)]
    number = 0
    for count in [min(first, room), *[room] * rounds]:
        for j, past in enumerate(pasts):
            new = torch.arange(number + 1, number + 1 + 6 * count).view(2, count, 1, 1, 3).float()
            number += 6 * count
            start, places = ring.turn(count)
            for some, place in places:
                place.copy_(new[:, some])
            whole = torch.cat([past, new], 1)
            assert torch.equal(ring.frames.roll(-start, 1)[:, : HISTORY + count], whole)
            pasts[j] = whole[:, -HISTORY:]
    assert ring.frames.shape[1] == HISTORY * convolutions + room


def test_only_the_first_frames_may_be_fewer_than_there_is_room_for():
    ring = FrameRing(1, 4, torch.empty(1, 4, 2, 2, 8))
    with pytest.raises(ValueError, match="5 frames where there is room for 4"):
        ring.turn(5)
    ring.turn(1)
    ring.turn(4)
    with pytest.raises(ValueError, match="only the first"):
        ring.turn(1)
