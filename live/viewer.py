import asyncio
import contextlib
import json
import time
from collections import deque

STATE_EVERY, STATE_AT_LEAST = 0.1, 5.0  # seconds between two states that differ, and between any two
TEXTS = 256  # messages that may wait for one browser


class Viewer:
    """What is still to be sent to one browser, and how far its player is.

    Frames and messages come from any thread and never wait: where the browser is slow the oldest go, and of the state
    only that it changed is kept. `next` is for the one task that sends.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most_frames: int):
        self._loop, self._most = loop, most_frames
        self._texts: deque[str] = deque(maxlen=TEXTS)
        self._frames: deque[tuple[bytes, float | None]] = deque()  # and, for a prompt's first, when it was asked for
        self._wake = asyncio.Event()
        self._state_changed, self._told = False, 0.0
        self.played = 0  # frames of the take that the player has shown
        self.dropped = 0  # frames that were never sent
        self.closed = ""  # why, once it is
        self._taken = time.monotonic()  # when something was last taken, or nothing waited

    def send(self, message: dict) -> None:
        """A message, before all frames that wait."""
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        self._post(lambda: self._texts.append(text))

    def show(self, packets: list[bytes], asked_at: float | None = None) -> None:
        """Frames, after those that wait; the oldest are dropped where there are too many. asked_at: when the prompt
        was asked for that they begin."""
        items = [(packet, None if index else asked_at) for index, packet in enumerate(packets)]
        self._post(lambda: self._add(items))

    def forget_frames(self) -> None:
        """Drops the frames that wait: another take begins."""
        self._post(self._frames.clear)

    def changed(self) -> None:
        """Says that the state is another than was sent."""
        self._post(lambda: setattr(self, "_state_changed", True))

    def close(self, reason: str) -> None:
        self._post(lambda: setattr(self, "closed", reason))

    def stalled_for(self) -> float:
        """Seconds that frames have waited with none taken."""
        return time.monotonic() - self._taken if self._frames else 0.0

    def _post(self, change) -> None:
        def run() -> None:
            change()
            self._wake.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the browser's connection
            self._loop.call_soon_threadsafe(run)

    def _add(self, items: list[tuple[bytes, float | None]]) -> None:
        if not self._frames:
            self._taken = time.monotonic()
        self._frames.extend(items)
        while len(self._frames) > self._most:
            self._frames.popleft()
            self.dropped += 1

    async def next(self) -> str | tuple[bytes, float | None] | None:
        """What to send next: a text, a frame (and when its prompt was asked for, if it is that one's first), or None
        where the state has to be sent, which is so every few seconds in any case. Waits until there is something.

        Raises ConnectionAbortedError where the server closed it.
        """
        while True:
            if self._texts:
                return self._texts.popleft()
            due = self._told + (STATE_EVERY if self._state_changed else STATE_AT_LEAST)
            wait = max(0.0, due - time.monotonic())
            if wait == 0:
                self._state_changed, self._told = False, time.monotonic()
                return None
            if self._frames:
                self._taken = time.monotonic()
                return self._frames.popleft()
            if self.closed:
                raise ConnectionAbortedError(self.closed)
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)
