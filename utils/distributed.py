"""The processes that torchrun starts, one a GPU. Alone, everything here does nothing."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """This process among its equals. They share work and files, and talk over gloo on the CPU.

    Use it in a `with` statement, or call `close` whatever happens: a process that leaves without may crash as it ends.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.world > 1:
            # Ranks meet again only when all their videos are done, which may be days later.
            dist.init_process_group("gloo", timeout=timedelta(days=30))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: every item goes to exactly one rank, whatever the counts."""
        return items[self.rank :: self.world]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on every rank; an exception there is raised on every rank."""
        if self.world == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def first_then_others(self, do: Callable[[], T]) -> T:
        """Calls `do` on the first rank, then on the others, which find what it left on the disk. An exception on the
        first rank is raised on every rank."""
        done: list[T] = []
        self.from_first(lambda: done.append(do()))
        return done[0] if self.is_first else do()

    def gather(self, item: T) -> list[T]:
        """Every rank's item, on the first rank; elsewhere an empty list."""
        if self.world == 1:
            return [item]
        items = [None] * self.world if self.is_first else None
        dist.gather_object(item, items)
        return items or []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
