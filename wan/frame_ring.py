import torch
from torch import Tensor

HISTORY = 2  # frames that a causal convolution sees of the past


class FrameRing:
    """The latest inputs of causal convolutions that run one after the other, in the same order each time, in one ring
    of frames, where none is ever copied.

    The history of the convolution whose turn it is is followed by `room` free frames. Its new ones go there. The last
    two of those are its history from then on; what is free now follows the history of the next convolution.

    frames: [B, 2·convolutions + room, H, W, C]; after the last one comes the first.
    """

    def __init__(self, convolutions: int, room: int, like: Tensor):
        """like [B, any, H, W, C]: has the sizes, the dtype and the device."""
        batch, _, *sizes = like.shape
        self.room = room
        self.frames = torch.zeros(batch, HISTORY * convolutions + room, *sizes, dtype=like.dtype, device=like.device)
        self._start = 0  # of the history whose turn it is
        self._filled = False  # whether every frame of a history is one, and none the zeros before a video

    def turn(self, count: int) -> tuple[int, list[tuple[slice, Tensor]]]:
        """The next convolution's turn, with `count` new frames: `room`, or fewer at the start of the video.

        Returns the first of the HISTORY + count frames that it sees, and where the new ones are to be written first:
        some of them, and the place of those [B, …, H, W, C].
        """
        if count != self.room and (count > self.room or self._filled):
            raise ValueError(f"{count} frames where there is room for {self.room}; only the first may be fewer")
        size = self.frames.shape[1]
        end = self._start + HISTORY + self.room
        first = (end - count) % size
        before = min(count, size - first)  # those up to where the ring closes
        places = [(slice(0, before), self.frames[:, first:first + before]),
                  (slice(before, count), self.frames[:, :count - before])]
        self._filled = count == self.room
        self._start = (self._start - HISTORY) % size
        return (end - count - HISTORY) % size, places[:1] if before == count else places
