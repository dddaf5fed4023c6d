import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

log = logging.getLogger(__name__)

WAITING = 2  # blocks that may wait before no more are made


class Output:
    """A thread that takes what was made away from the generation thread: encodes, sends and records it, in order."""

    def __init__(self, name: str):
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        return self._work.qsize() >= WAITING

    def call(self, function: Callable, *args) -> Future:
        """Runs function(*args) after all that was given before."""
        future: Future = Future()
        self._work.put((future, function, args))
        return future

    def close(self, timeout: float | None = None) -> None:
        """Waits for what was given, and ends the thread."""
        self._work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function, args = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args))
            except Exception as error:
                log.debug("%s failed", function, exc_info=True)
                future.set_exception(error)
