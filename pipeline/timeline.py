import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from wan.geometry import first_frame, latents_for, whole_blocks


@dataclass(frozen=True)
class Segment:
    """A prompt, the latent it was asked from, the latent (first of a block) it takes hold at, and what it does to the
    cache, as `Session.set_prompt` has it."""

    prompt: str
    asked: int
    latent: int
    refresh: str = "recache"


@dataclass(frozen=True)
class Timeline:
    """Which prompt from which latent, and how long the video is.

    segments: in order; the first at latent 0. A prompt asked from latent s takes hold at the first block that starts
    at or after s; of several in one block the last wins, the others are in `dropped`.
    latents: whole blocks to generate; frames: what is kept of them.
    Iterating gives the prompt of each block.
    """

    segments: tuple[Segment, ...]
    dropped: tuple[Segment, ...]
    block: int
    latents: int
    frames: int

    @classmethod
    def build(cls, prompts: list[str], switches: list[int], *, block: int, frames: int) -> "Timeline":
        """prompts[0] from the start, prompts[i+1] from latent switches[i]; `frames` frames in all.

        Raises ValueError where switches are not one fewer than the prompts, not in order or not inside the video.
        """
        latents = latents_for(frames)
        if len(switches) != len(prompts) - 1:
            raise ValueError(f"{len(prompts)} prompts need {len(prompts) - 1} switch indices, got {len(switches)}")
        for before, after in itertools.pairwise([0, *switches]):
            if after <= before:
                raise ValueError(f"switch indices must rise from above 0, got {switches}")
            if after >= latents:
                raise ValueError(f"switch index {after} is outside the video, which has {latents} latents "
                                 f"(0 to {latents - 1}); lower it or make the video longer")
        asked = [Segment(p, s, whole_blocks(s, block)) for p, s in zip(prompts, [0, *switches], strict=True)]
        total = whole_blocks(latents, block)
        last = {segment.latent: segment for segment in asked if segment.latent < total}
        kept = tuple(last.values())
        dropped = tuple(segment for segment in asked if segment not in kept)
        return cls(kept, dropped, block, total, frames)

    @classmethod
    def evenly(cls, prompts: list[str], *, block: int, frames: int) -> "Timeline":
        """As many blocks for each prompt as for the others, or one more.

        Raises ValueError where there are more prompts than blocks.
        """
        blocks = whole_blocks(latents_for(frames), block) // block
        if len(prompts) > blocks:
            raise ValueError(f"{len(prompts)} prompts need at least as many blocks, but the video has {blocks}; "
                             f"give it at least {len(prompts) * block} latents or fewer prompts")
        switches = [block * (i * blocks // len(prompts)) for i in range(1, len(prompts))]
        return cls.build(prompts, switches, block=block, frames=frames)

    def __iter__(self) -> Iterator[str]:
        starts = {segment.latent: segment.prompt for segment in self.segments}
        prompt = None
        for latent in range(0, self.latents, self.block):
            prompt = starts.get(latent, prompt)
            yield prompt

    def __len__(self) -> int:
        return self.latents // self.block

    def refresh_at(self, latent: int) -> str:
        """What the prompt that takes hold at a latent does to the cache."""
        return next((segment.refresh for segment in self.segments if segment.latent == latent), "recache")

    def plan(self, fps: int) -> list[dict]:
        """Per segment: prompt, latent, frame, second it takes hold at, and the latent it was asked from."""
        return [
            {"prompt": s.prompt, "latent": s.latent, "frame": first_frame(s.latent),
             "second": round(first_frame(s.latent) / fps, 3), "asked_latent": s.asked}
            for s in self.segments
        ]
