"""Frames as they go through a WebSocket: a header and a JPEG, each frame by itself.

JPEG, not H.264: any frame can be left out where a browser is slow, none waits for the next one, and every browser shows
it with nothing buffered. It takes about 6 times the bandwidth. WebP takes ten times the processor's time.
`scripts/benchmark_transport.py` measures all three.
"""

import io
import struct
import time
from collections.abc import Iterator

from PIL import Image

from live.take import Block

HEADER = struct.Struct("<BBHIId")  # version, flags, take, frame, prompt's number, Unix time it was made
VERSION = 1
NEW_PROMPT = 1  # flag: the first frame under its prompt
STILL = 2  # flag: sent again for a picture at once, not to be played
QUALITY = 85


def pack(block: Block, take: int) -> Iterator[bytes]:
    """A message for each frame of a block, each made when it is asked for."""
    now = time.time()
    for index, frame in enumerate(block.frames.numpy()):
        flags = NEW_PROMPT if block.asked_at is not None and index == 0 else 0
        header = HEADER.pack(VERSION, flags, take & 0xFFFF, block.first + index, block.number, now)
        yield header + jpeg(frame)


def jpeg(frame) -> bytes:
    """A frame, uint8 [H, W, 3], as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def still(packet: bytes) -> bytes:
    """The same frame, marked as one that is not to be played."""
    return packet[:1] + bytes([STILL]) + packet[2:]
