"""What the two front-ends share: arguments, messages and exit codes."""

import argparse
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.config import Config, load_config, nearest
from utils.errors import UserError
from utils.interrupts import raise_interrupts
from utils.paths import find_file
from utils.prompts import LONGEST_SECONDS, Story, check_story
from wan.geometry import frames_of

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

# What PyTorch, CUDA and its libraries say.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
# Failures of a file anywhere that its user can mend.
MENDABLE = {errno.EACCES: "allow it", errno.EPERM: "allow it", errno.EROFS: "choose another place",
            errno.ENOSPC: "free some space", errno.EDQUOT: "free some space"}
# Options, and the key of the config that each stands for.
OPTION_KEYS = [("data_path", "prompt"), ("num_output_frames", "seconds"), ("num_output_frames", "num_output_frames"),
               ("seed", "seed"), ("num_samples", "num_samples"), ("output_folder", "output_folder")]
# What the description of a video says already.
TOLD_BY_REMAKE = ("data_path", "seed", "num_samples", "num_output_frames", "switch_frame_indices")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError."""

    def error(self, message: str):
        word = re.fullmatch(r"unrecognized arguments: (-[^\s=]*).*", message)
        hint = nearest(word[1], list(self._option_string_actions)) if word else ""
        raise UserError(f"{message}{hint}; --help shows all options")


def make_parser(description: str, epilog: str, default_config: str, prompt_help: str) -> argparse.ArgumentParser:
    parser = Parser(description=description, epilog=epilog, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("args", nargs="*", metavar="FILE|key=value",
        help="a .yaml config, a prompt file, and overrides of single keys such as seed=1 model_kwargs.sink_size=6")
    add("--config", "--config_path", "--config-path", metavar="PATH", default=None,
        help=f"YAML config (default: {default_config})")
    add("--prompt", action="append", metavar="TEXT", help=prompt_help)
    add("--seconds", type=float, metavar="S", help="length of each video in seconds")
    add("--num-output-frames", type=int, metavar="N",
        help="length in latents: N latents are 4N-3 frames; rounded up to whole blocks, then trimmed")
    add("--seed", type=int, help="same seed, same video")
    add("--num-samples", type=int, metavar="N", help="videos of each prompt, with different noise")
    add("--output-folder", metavar="PATH", help="where the MP4s go")
    add("--overwrite", action="store_true", help="make videos again that are there already")
    add("--remake", metavar="JSON", help="make the video again that the .json beside an .mp4 describes")
    add("--profile", metavar="FILE", help="write the table at the end as JSON too")
    parser.set_defaults(default_config=default_config)
    return parser


@dataclass(frozen=True)
class Task:
    """What a command line asks for."""

    config: Config
    prompts: list[str]  # given on the command line, in place of the config's data_path
    frames: int  # length of a video that does not say its own
    overrule: bool  # of one that does, too: the length stands on the command line
    remake: Path | None  # the description of a video to make again, in place of prompts
    overwrite: bool
    profile: Path | None

    def data_path(self) -> Path:
        """The prompt file. Raises UserError where there is none."""
        if self.config.data_path is None:
            raise UserError("no prompts: give --prompt TEXT, a prompt file, or data_path in the config")
        return find_file(self.config.data_path, "data_path", "give --prompt TEXT, or the path of your own file")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Task:
    """Raises UserError for a command line that does not make sense."""
    args = parser.parse_intermixed_args(argv)
    overrides = [arg for arg in args.args if re.match(r"[\w.-]+=", arg)]
    files = [arg for arg in args.args if arg not in overrides]
    configs = [f for f in files if f.endswith((".yaml", ".yml"))] + ([args.config] if args.config else [])
    data = [f for f in files if not f.endswith((".yaml", ".yml"))]
    for path in data:
        find_file(path, "prompt file", "to give a prompt itself: --prompt TEXT; to give a setting: key=value")
    said = _check_agreement(args, configs, data, overrides)
    overrides += [f"data_path={json.dumps(path)}" for path in data]
    for key in ("seed", "num_samples", "output_folder"):
        if (value := getattr(args, key)) is not None:
            overrides.append(f"{key}={json.dumps(value)}")
    for prompt in args.prompt or []:
        check_story(Story([prompt], where="--prompt"))
    remake = _description(args.remake) if args.remake else None
    config = load_config(configs[0] if configs else remake or args.default_config, overrides,
                         round_length=args.seconds is not None or args.num_output_frames is not None)
    profile = Path(args.profile) if args.profile else None
    if profile is not None and profile.is_dir():
        raise UserError(f"--profile {profile} is a folder; give the path of a file")
    return Task(config, args.prompt or [], _length(args, config), "num_output_frames" in said, remake, args.overwrite,
                profile)


def _check_agreement(args: argparse.Namespace, configs: list[str], data: list[str],
                     overrides: list[str]) -> set[str]:
    """The keys of the config that a command line gives. Raises UserError where one part of it would overrule another.
    """
    for what, given in (("config", configs), ("prompt file", data)):
        if len(given) > 1:
            raise UserError(f"one {what} at a time, got {' and '.join(given)}")
    said: dict[str, list[str]] = defaultdict(list)  # what was given for a key
    for key, option in OPTION_KEYS:
        if getattr(args, option) is not None:
            said[key].append(f"--{option.replace('_', '-')}")
    said["data_path"] += data
    for key, override in {override.split("=")[0]: override for override in overrides}.items():  # the last of a key wins
        said[key].append(override)
    if args.remake and (extra := [given for key in TOLD_BY_REMAKE for given in said[key]]):
        raise UserError(f"--remake makes a video as its description says; leave out {' and '.join(extra)}")
    for given in said.values():
        if len(given) > 1:
            raise UserError(f"give {' or '.join(given)}, not both")
    return {key for key, given in said.items() if given}


def _description(path: str) -> Path:
    """The file beside an MP4 that says how it was made. Raises UserError where it is none."""
    mend = "give the .json that lies beside an .mp4"
    found = find_file(path, "--remake", mend)
    try:
        about = json.loads(found.read_bytes())
    except (ValueError, RecursionError):
        about = None
    told = about.get("request") if isinstance(about, dict) else None
    if not (isinstance(told, dict) and "prompts" in told and isinstance(about.get("config"), dict)):
        raise UserError(f"--remake {found}: not a description of a video; {mend}")
    return found


def _length(args: argparse.Namespace, config: Config) -> int:
    """Frames asked for."""
    if args.seconds is not None:
        if not 0 < args.seconds <= LONGEST_SECONDS:
            raise UserError(f"--seconds {args.seconds} must be above 0 and at most {LONGEST_SECONDS:,}")
        return max(1, round(args.seconds * config.fps))
    latents = config.num_output_frames if args.num_output_frames is None else args.num_output_frames
    if latents < 1:
        raise UserError(f"--num-output-frames {latents} must be at least 1 latent")
    return frames_of(latents)


def guarded(work: Callable[[], None]) -> int:
    """Runs a front-end, as all that its process does. Returns its exit code; says in one line what the user can mend.

    0 done, 1 unexpected failure (with its traceback), 2 bad input or too little memory, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "filelock", "transformers", "diffusers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    was_interrupted = raise_interrupts()
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        # In the middle of a library's work an interrupt can come out as any other error.
        if was_interrupted() or isinstance(error, KeyboardInterrupt):
            _say("interrupted; run the same command again to go on: videos that are whole are skipped, one that was "
                 "cut off is made again from its start")
            return EXIT_INTERRUPTED
        if isinstance(error, UserError):
            return _fail(str(error))
        if mendable := _mendable(error):
            return _fail(mendable)
        _has_last_word()
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


def _mendable(error: Exception) -> str:
    """What to tell the user of an unforeseen error that is not the program's own; "" where it is."""
    number = error.errno if isinstance(error, OSError) else None
    said = OUT_OF_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    if said or isinstance(error, MemoryError) or number == errno.ENOMEM:
        asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
        return (f"out of memory{f' ({asked[0].lower()})' if asked else ''}; lower height and width, then "
                f"model_kwargs.local_attn_size, or set text_encoder_device=cpu; close what else uses the device")
    if number in MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}; {MENDABLE[number]} and run the same command again"
    return ""


def _has_last_word() -> bool:
    """Whether it is for this process to say why it ends: of several that `scripts/several_processes.py` runs the first
    that fails does, for the others meet the same or are ended by torchrun."""
    mark = os.environ.get("LONGLIVE_LAST_WORD")
    if mark is None:
        return True
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than never
    return True


def _say(line: str) -> None:
    if _has_last_word():
        sys.stderr.write(line + "\n")


def _fail(message: str) -> int:
    _say(f"error: {' '.join(message.splitlines())}")
    return EXIT_USER_ERROR
