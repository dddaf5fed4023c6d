import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.engine import Engine
from pipeline.session import Session
from pipeline.timeline import Segment, Timeline
from utils.config import Config
from wan.geometry import first_frame, frames_of, latents_for, whole_blocks


@dataclass
class Change:
    """A prompt that is asked for. `number` tells it from all others of its show and rises; `embeds` is done once the
    prompt is encoded, so that no block waits for that."""

    prompt: str
    refresh: str
    number: int
    latent: int  # asked for from here on
    embeds: Future
    asked_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Block:
    """A block that was made: its frames, uint8 [T, H, W, 3], and the number of the first; the prompt's number, and
    where it is new, when it was asked for."""

    frames: Tensor
    first: int
    number: int
    asked_at: float | None = None


class Take:
    """One video while it is typed: a `Session`, the prompts that wait, and those that took hold.

    Whoever has several threads locks around all but `make`, which is the long part.
    """

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed
        self.session: Session | None = None
        self.latents = 0  # made
        self.begun = 0  # latents made or being made
        self.number = 0  # of the present prompt
        self.applied: list[tuple[int, Segment]] = []  # number, and where it took hold
        self.next: Change | None = None  # takes hold as soon as it can
        self.scheduled: list[Change] = []  # by latent
        self._begun: Change | None = None  # picked for the block that is being made

    @property
    def frames(self) -> int:
        """Frames made so far."""
        return frames_of(self.latents)

    @property
    def prompt(self) -> str | None:
        return self.applied[-1][1].prompt if self.applied else None

    @property
    def wanted(self) -> str | None:
        """The prompt that was asked for last, whether or not it has taken hold."""
        latest = self.next or self._begun
        return latest.prompt if latest is not None else self.prompt

    @property
    def waiting(self) -> list[Change]:
        """The prompts that have not taken hold yet."""
        return self.scheduled + ([] if self.next is None else [self.next])

    def ask(self, change: Change) -> None:
        """A prompt for the next block; takes the place of another that waits for it."""
        if self.next is not None:
            self.next.embeds.cancel()
        self.next = change

    def schedule(self, change: Change) -> None:
        """A prompt for the first block that starts at or after its latent."""
        self.scheduled.append(change)
        self.scheduled.sort(key=lambda one: (one.latent, one.number))

    def cancel(self, number: int) -> bool:
        """Takes back a prompt that waits; says whether there was one."""
        before = len(self.scheduled)
        self.scheduled = [change for change in self.scheduled if change.number != number]
        if self.next is not None and self.next.number == number:
            self.next = None
            return True
        return len(self.scheduled) < before

    def _due(self) -> list[Change]:
        scheduled = [change for change in self.scheduled if change.latent <= self.latents]
        return [change for change in (*scheduled, self.next) if change is not None and change.embeds.done()]

    def can_go_on(self) -> bool:
        """Whether there is a prompt for the next block."""
        return self.prompt is not None or bool(self._due())

    def has_due(self) -> bool:
        """Whether the next block begins a new prompt."""
        return bool(self._due())

    def pick(self) -> Change | None:
        """Begins the next block: the prompt that it begins with, if any; of several the last wins. Raises what its
        encoding raised."""
        self.begun = self.latents + self.config.num_frame_per_block
        due = self._due()
        if not due:
            return None
        change = due[-1]
        self.scheduled = [one for one in self.scheduled if one not in due]
        if change is self.next:
            self.next = None
        self._begun = change
        if error := change.embeds.exception():
            raise error
        return change

    def make(self, engine: Engine, change: Change | None) -> Tensor:
        """Computes the next block, the first under `change` where that is given. Returns its frames."""
        if self.session is None:
            self.session = engine.session(self.seed, config=self.config)
        if change is not None:
            self.session.set_prompt(change.prompt, change.refresh)
        return self.session.step()

    def done(self, change: Change | None, frames: Tensor) -> Block:
        """Notes that `make` came to its end."""
        first = self.frames
        self.latents += self.config.num_frame_per_block
        if change is None:
            return Block(frames, first, self.number)
        latent = self.latents - self.config.num_frame_per_block
        if change.prompt != self.prompt:
            self.applied.append((change.number, Segment(change.prompt, change.latent, latent, change.refresh)))
        self.number, self._begun = change.number, None
        return Block(frames, first, self.number, change.asked_at)

    def latent_at(self, second: float) -> int:
        """The first latent whose picture is not seen before that second."""
        frame = math.ceil(second * self.config.fps - 1e-6)
        return latents_for(frame) if frame > 0 else 0

    def frame_of(self, latent: int) -> int:
        """The first frame of the block, of those not begun yet, that starts at or after a latent."""
        return first_frame(whole_blocks(max(latent, self.begun), self.config.num_frame_per_block))

    def second_of(self, latent: int) -> float:
        """When that block is seen."""
        return self.frame_of(latent) / self.config.fps

    def timeline(self, frames: int) -> Timeline:
        """What the first `frames` frames show."""
        block = self.config.num_frame_per_block
        latents = whole_blocks(latents_for(frames), block)
        segments = tuple(segment for _, segment in self.applied if segment.latent < latents)
        return Timeline(segments, (), block, latents, frames)


Encode = Callable[[str], Future]
