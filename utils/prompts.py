"""Prompt files: one prompt a line, or JSONL with a story (prompts over time) a line."""

import io
import itertools
import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.timeline import Timeline
from utils.config import Config, nearest
from utils.errors import UserError
from utils.paths import read_text
from wan.geometry import FRAMES, frames_of, latents_for

log = logging.getLogger(__name__)

LONGEST_NAME = 200  # bytes; a file name has at most 255, and more is added to it
LONGEST_SECONDS = 1_000_000


@dataclass(frozen=True)
class Story:
    """One video as asked for: its prompts, when they change, and what it says of itself. `where` is for messages."""

    prompts: list[str]
    switch_frame_indices: list[int] | None = None  # latents
    durations: list[float] | None = None  # seconds of each prompt
    num_output_frames: int | None = None  # latents
    seed: int | None = None
    name: str | None = None
    where: str = ""

    def timeline(self, config: Config, frames: int, overrule: bool = False) -> Timeline:
        """When each prompt takes hold. `frames`: length in frames where the story has none of its own; with `overrule`
        in any case, and `durations` are scaled to it.

        Without times of its own the config's `switch_frame_indices` count if they fit, else the video is split evenly.
        Raises UserError for times that do not fit the video.
        """
        own = self._own_frames(config.fps)
        if own is not None and overrule and own != frames:
            log.info("%s: made %.1f s long as the command line says, in place of its own %.1f s%s", self.where,
                     frames / config.fps, own / config.fps, "; durations are scaled" if self.durations else "")
        elif own is not None:
            frames = own
        block, switches = config.num_frame_per_block, self.switch_frame_indices
        try:
            if frames > LONGEST_SECONDS * config.fps:
                raise ValueError(f"{frames} frames are longer than {LONGEST_SECONDS:,} s; lower num_output_frames or "
                                 f"durations")
            if self.durations is not None:
                switches = self._switches(frames, block, config.fps)
            elif switches is None and config.switch_frame_indices and len(self.prompts) > 1:
                if _fits(config.switch_frame_indices, len(self.prompts), latents_for(frames)):
                    switches = config.switch_frame_indices
                else:
                    log.info("%s: switch_frame_indices=%s do not fit %d prompts in %d latents; split evenly instead",
                             self.where, config.switch_frame_indices, len(self.prompts), latents_for(frames))
            if switches is not None:
                return Timeline.build(self.prompts, switches, block=block, frames=frames)
            return Timeline.evenly(self.prompts, block=block, frames=frames)
        except ValueError as error:
            raise UserError(f"{self.where}: {error}") from None

    def _own_frames(self, fps: int) -> int | None:
        """The length that the story says, in frames."""
        if self.durations is not None:
            return round(sum(self.durations) * fps)
        return None if self.num_output_frames is None else frames_of(self.num_output_frames)

    def _switches(self, frames: int, block: int, fps: int) -> list[int]:
        """Latents at which the second, third, … prompt begins, from `durations` in a video of so many frames. Raises
        ValueError for one that is too short to show."""
        total = sum(self.durations)
        scale = 1.0 if frames == round(total * fps) else frames / (total * fps)
        ends = [round(sum(self.durations[: i + 1]) * scale * fps) for i in range(len(self.durations))]
        starts = [latents_for(end + 1) - 1 for end in ends]
        for number, (before, after) in enumerate(itertools.pairwise([0, *starts]), 1):
            if after == before:
                raise ValueError(f"prompt {number} lasts {self.durations[number - 1] * scale:.3g} s, too short to "
                                 f"show; prompts begin with blocks: give it at least {block * FRAMES / fps:.3g} s "
                                 f"(one block) or leave it out")
        return starts[:-1]


def _fits(switches: list[int], prompts: int, latents: int) -> bool:
    return len(switches) == prompts - 1 and all(s < latents for s in switches)


def read_prompts(path: Path) -> list[Story]:
    """A story of one prompt for each line that is not blank. Raises UserError for a file that is not text or empty."""
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path}: no prompts in it; write one a line")
    if re.match(r'\{\s*"', lines[0][0]):
        raise UserError(f"{path}: this is JSONL, prompts over time; run it with interactive_inference.py "
                        f"(bash scripts/interactive_inference.sh)")
    return [check_story(Story([line], where=where)) for line, where in lines]


def read_stories(path: Path) -> list[Story]:
    """The stories of a JSONL file; blank lines are skipped. Raises UserError that names the line of what is wrong."""
    lines = _lines(path)
    if not lines:
        raise UserError(f'{path}: no stories in it; write one JSON object a line, such as {{"prompts": ["…", "…"]}}')
    if not any(line[0] in '{["' for line, _ in lines):
        raise UserError(f"{path}: this is text, not JSONL; to make a video of each of its lines, run it with "
                        f"inference.py (bash scripts/inference.sh)")
    return [_story(line, where) for line, where in lines]


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that are not blank, stripped, each with its place for messages. Only \\n, \\r and both end a
    line: `str.splitlines` also splits at characters that may stand in a prompt."""
    return [(line.strip(), f"{path}, line {number}")
            for number, line in enumerate(io.StringIO(read_text(path), newline=None), 1) if line.strip()]


def _story(line: str, where: str) -> Story:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); each line is one object such as "
                        f'{{"prompts": ["…", "…"]}}') from None
    known = [f.name for f in fields(Story) if f.name != "where"]
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"prompts": ["…", "…"]}}, '
                        f"got {type(entry).__name__}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{nearest(key, known)}; known are {', '.join(known)}")
    return check_story(Story(**{"prompts": [], **entry}, where=where))


def check_story(story: Story) -> Story:
    """The story, if all its fields have the types and ranges they need. Raises UserError otherwise."""
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{story.where}: {message}")

    def whole(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    prompts, switches, durations = story.prompts, story.switch_frame_indices, story.durations
    need(isinstance(prompts, list) and bool(prompts) and all(isinstance(p, str) for p in prompts),
         f"prompts must be a list of at least one text, got {json.dumps(prompts)[:80]}")
    for number, prompt in enumerate(prompts, 1):
        need(bool(prompt.strip()), f"prompt {number} is empty; write what the video should show, or leave it out")
        need(_is_unicode(prompt), f"prompt {number} has half a character (a surrogate), {prompt[:40]!a}; write it anew")
    need(switches is None or durations is None, "give switch_frame_indices or durations, not both")
    need(durations is None or story.num_output_frames is None,
         "give durations or num_output_frames, not both: the durations add up to the length")
    need(switches is None or (isinstance(switches, list) and all(map(whole, switches))),
         f"switch_frame_indices must be a list of whole numbers (latents), got {json.dumps(switches)}")
    if durations is not None:
        numbers = isinstance(durations, list) and all(
            isinstance(d, (int, float)) and not isinstance(d, bool) and 0 < d <= LONGEST_SECONDS for d in durations)
        need(numbers, f"durations must be a list of seconds above 0 and at most {LONGEST_SECONDS:,}, "
                      f"got {json.dumps(durations)}")
        need(len(durations) == len(prompts), f"{len(prompts)} prompts need {len(prompts)} durations, "
                                             f"got {len(durations)}")
    need(story.num_output_frames is None or (whole(story.num_output_frames) and story.num_output_frames > 0),
         f"num_output_frames must be a whole number of latents above 0, got {json.dumps(story.num_output_frames)}")
    need(story.seed is None or (whole(story.seed) and 0 <= story.seed < 2**63),
         f"seed must be a whole number from 0 to 2^63-1, got {json.dumps(story.seed)}")
    name = story.name
    need(name is None or isinstance(name, str), f"name must be a text, got {json.dumps(name)}")
    if name is not None:
        plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and not name.startswith(".") \
            and not name.endswith(".partial")  # what a video is called until it is whole
        need(plain and 0 < len(name.encode()) <= LONGEST_NAME,
             f"name {name!r} can't be a file name; use letters, digits, - and _, no /, at most {LONGEST_NAME} bytes")
    return story


def _is_unicode(text: str) -> bool:
    """Whether a text has no surrogates, which JSON's \\ud800 and odd bytes on a command line leave in one."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def shorten(prompt: str, width: int) -> str:
    """A prompt, or the beginning of one that is longer than `width` characters."""
    return prompt if len(prompt) <= width else prompt[: width - 1] + "…"
