"""Ctrl-C, SIGTERM and SIGHUP: they stop the work where it is, but never the finishing of a file."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 3.0  # seconds


def raise_interrupts() -> Callable[[], bool]:
    """From now on those signals raise KeyboardInterrupt. Returns a function that says whether one came.

    One that follows another within GRACE seconds is the same wish (hands press twice, torchrun sends two kinds) and
    must not cut short the tidying up, or the interpreter's own end: it is dropped.
    """
    last = -GRACE

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= GRACE:
            raise KeyboardInterrupt

    _handle(stop)
    return lambda: last >= 0


class held:
    """While the body runs, those signals wait; one that came is delivered at its end.

        with held() as hold:
            open_file()
            with hold.lifted():
                compute()       # what a signal may stop
            close_file()
    """

    def __enter__(self) -> "held":
        self._came: list[int] = []
        self._before = _handle(self._wait)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._lift()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Signals are delivered while this runs; first one that came before."""
        self._lift()
        try:
            yield
        finally:
            _handle(self._wait)

    def _wait(self, signum: int, frame: FrameType | None) -> None:
        self._came.append(signum)

    def _lift(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came:
            number = self._came[0]
            self._came.clear()
            signal.raise_signal(number)


def _handle(handler) -> dict:
    """Sets a handler for the signals that are not switched off, as nohup does; returns those that it replaced. Python
    delivers signals to the main thread alone: in any other there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    live = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in live}
