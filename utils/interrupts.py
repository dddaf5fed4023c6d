"""Ctrl-C, SIGTERM and SIGHUP: they stop the work where it is, but never the finishing of a file."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 3.0  # seconds


@contextmanager
def raised() -> Iterator[None]:
    """While the body runs, those signals raise KeyboardInterrupt.

    One that follows another within GRACE seconds is the same wish (hands press twice, torchrun sends two kinds) and
    must not cut the tidying up short: it is dropped.
    """
    last = -GRACE

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= GRACE:
            raise KeyboardInterrupt

    before = _handle(stop)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def held() -> Iterator[None]:
    """While the body runs, those signals wait; one that came is delivered at its end."""
    came: list[int] = []
    before = _handle(lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        _restore(before)
        if came:
            signal.raise_signal(came[0])


def _handle(handler) -> dict:
    """Sets a handler for the signals that are not switched off, as nohup does; returns those that it replaced. Python
    delivers signals to the main thread alone: in any other there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    live = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in live}


def _restore(before: dict) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
