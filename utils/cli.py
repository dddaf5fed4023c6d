"""What the two front-ends share: arguments, messages and exit codes."""

import argparse
import logging
import math
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from utils.config import Config, load_config
from utils.errors import UserError
from utils.paths import find_file
from utils.prompts import Story, check_story
from wan.geometry import frames_of

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def make_parser(description: str, epilog: str, default_config: str, prompt_help: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
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
    remake: Path | None  # the description of a video to make again, in place of prompts
    overwrite: bool
    profile: Path | None

    def data_path(self) -> Path:
        """The prompt file. Raises UserError where there is none."""
        if self.config.data_path is None:
            raise UserError("no prompts: give --prompt TEXT, a prompt file, or data_path in the config")
        return find_file(self.config.data_path, "data_path", "give --prompt TEXT, or the path of your own file")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Task:
    """Raises UserError for a command line that does not make sense; argparse itself exits with 2."""
    args = parser.parse_intermixed_args(argv)
    overrides = [arg for arg in args.args if re.match(r"[\w.]+=", arg)]
    files = [arg for arg in args.args if arg not in overrides]
    configs = [f for f in files if f.endswith((".yaml", ".yml"))] + ([args.config] if args.config else [])
    data = [f for f in files if not f.endswith((".yaml", ".yml"))]
    for what, given in (("config", configs), ("prompt file", data)):
        if len(given) > 1:
            raise UserError(f"one {what} at a time, got {' and '.join(given)}")
    if args.prompt and data:
        raise UserError(f"give --prompt or the prompt file {data[0]}, not both")
    if data:
        find_file(data[0], "prompt file")
        overrides.append(f"data_path={data[0]}")
    for key in ("seed", "num_samples", "output_folder"):
        if (value := getattr(args, key)) is not None:
            overrides.append(f"{key}={value}")
    for prompt in args.prompt or []:
        check_story(Story([prompt], where="--prompt"))
    remake = Path(args.remake) if args.remake else None
    config = load_config(configs[0] if configs else remake or args.default_config, overrides)
    profile = Path(args.profile) if args.profile else None
    return Task(config, args.prompt or [], _length(args, config), remake, args.overwrite, profile)


def _length(args: argparse.Namespace, config: Config) -> int:
    """Frames asked for."""
    if args.seconds is not None and args.num_output_frames is not None:
        raise UserError("give --seconds or --num-output-frames, not both")
    if args.seconds is not None:
        if not (math.isfinite(args.seconds) and args.seconds > 0):
            raise UserError(f"--seconds {args.seconds} must be above 0")
        return max(1, round(args.seconds * config.fps))
    latents = config.num_output_frames if args.num_output_frames is None else args.num_output_frames
    if latents < 1:
        raise UserError(f"--num-output-frames {latents} must be at least 1 latent")
    return frames_of(latents)


def guarded(work: Callable[[], None]) -> int:
    """Runs a front-end. Returns its exit code; says in one line what the user can mend.

    0 done, 1 unexpected failure (with its traceback), 2 bad input or too little memory, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "filelock", "transformers", "diffusers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        work()
    except UserError as error:
        return _fail(str(error))
    except torch.OutOfMemoryError as error:
        return _fail(_out_of_memory(str(error)))
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on, finished videos are skipped")
        return 130
    except Exception as error:
        if "can't allocate memory" in str(error):
            return _fail(_out_of_memory(str(error)))
        traceback.print_exc()
        return 1
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return 2


def _out_of_memory(reason: str) -> str:
    asked = re.search(r"Tried to allocate [\d.]+ \w+", reason)
    return (f"out of memory ({asked[0].lower() if asked else 'the host has no more'}); lower height and width, then "
            f"model_kwargs.local_attn_size, or set text_encoder_device=cpu; close what else uses the device")
