"""Arguments of live.py."""

import argparse
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from live.limits import Limits
from live.security import Access
from utils.cli import Parser
from utils.config import Config, load_config
from utils.errors import UserError
from utils.paths import locate
from utils.prompts import LONGEST_SECONDS, Story, check_story, read_prompts, read_stories

DEFAULT_CONFIG = "configs/demo_interactive.yaml"
DEFAULT_PORT = 8765
SUGGESTIONS = 60
LIMITS = {  # option: (limit, factor, unit)
    "lead": ("lead_seconds", 1, "seconds of video that are made before they are needed"),
    "max-sessions": ("sessions", 1, "sessions at a time"),
    "max-minutes": ("session_seconds", 60, "minutes of video that a session may have"),
    "idle-minutes": ("idle_seconds", 60, "minutes after which a session that nobody watches ends"),
    "max-jobs": ("jobs", 1, "jobs that may wait"),
    "disk-gb": ("disk_bytes", 10**9, "gigabytes that recordings may take; the oldest go first"),
    "max-prompt": ("prompt_characters", 1, "characters of a prompt"),
}
EXAMPLES = """examples:
  python live.py                                           the small model that comes with this repository
  python live.py configs/interactive.yaml                  the full model (first: bash scripts/download.sh)
  python live.py --terminal                                no page: prompts are read line by line
  printf 'a red ball\\n@4 a blue ball\\n' | python live.py --terminal --seconds 8
  LONGLIVE_TOKEN=$(openssl rand -hex 16) python live.py --host 0.0.0.0

On a server, leave --host out and forward the port: ssh -L 8765:localhost:8765 SERVER, then open http://localhost:8765/."""


@dataclass(frozen=True)
class LiveTask:
    """What a command line asks for."""

    config: Config
    folder: Path
    limits: Limits
    access: Access
    port: int
    open_page: bool
    terminal: bool
    prompt: str | None
    seconds: float | None


def parse(argv: list[str] | None) -> LiveTask:
    """Raises UserError for a command line that does not make sense."""
    args = _parser().parse_intermixed_args(argv)
    overrides = [arg for arg in args.args if re.match(r"[\w.-]+=", arg)]
    configs = [arg for arg in args.args if arg not in overrides] + ([args.config] if args.config else [])
    if len(configs) > 1:
        raise UserError(f"one config at a time, got {' and '.join(configs)}")
    if configs and not configs[0].endswith((".yaml", ".yml", ".json")):
        raise UserError(f"{configs[0]} is no .yaml config and no key=value")
    config = load_config(configs[0] if configs else DEFAULT_CONFIG, overrides)
    if not args.terminal and (args.prompt or args.seconds is not None):
        raise UserError("--prompt and --seconds are for --terminal; on the page, type the prompt")
    if args.prompt is not None:
        check_story(Story([args.prompt], where="--prompt"))
    if args.seconds is not None and not 0 < args.seconds <= LONGEST_SECONDS:
        raise UserError(f"--seconds {args.seconds} must be above 0 and at most {LONGEST_SECONDS:,}")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port} must be from 0 (any that is free) to 65535")
    token = os.environ.get("LONGLIVE_TOKEN", "") if args.token is None else args.token
    return LiveTask(config, Path(args.output_folder), _limits(args), Access(args.host, token, tuple(args.origin)),
                    args.port, not args.no_browser and _has_screen(), args.terminal, args.prompt, args.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Video that plays while it is made and follows what you type.", epilog=EXAMPLES,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("args", nargs="*", metavar="CONFIG.yaml|key=value", help="a config, and overrides of single keys")
    add("--config", metavar="PATH", help=f"YAML config (default: {DEFAULT_CONFIG})")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone); others need a token")
    add("--port", type=int, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}; 0: any that is free")
    add("--token", help="what browsers must know; better: LONGLIVE_TOKEN, which other users of the machine do not see")
    add("--origin", action="append", default=[], metavar="URL", help="another web page that may use it, "
                                                                     "as https://example.org")
    add("--output-folder", default="videos/live", metavar="PATH", help="where recordings go (default: videos/live)")
    add("--no-browser", action="store_true", help="do not open the page")
    add("--terminal", action="store_true", help="no page: a prompt a line, one MP4; '@12 a prompt' is for "
                                           "second 12; of several for one block the last wins")
    add("--prompt", metavar="TEXT", help="with --terminal: the first prompt")
    add("--seconds", type=float, metavar="S", help="with --terminal: length; without it, until the input ends")
    for option, (_, _, about) in LIMITS.items():
        add(f"--{option}", type=float, metavar="N", help=about)
    return parser


def _limits(args: argparse.Namespace) -> Limits:
    kinds = {item.name: item.type for item in fields(Limits)}
    given = {}
    for option, (name, factor, about) in LIMITS.items():
        value = getattr(args, option.replace("-", "_"))
        if value is None:
            continue
        if not 0 < value < 1e9:
            raise UserError(f"--{option} {value:g} must be a number above 0: {about}")
        if kinds[name] is int and factor == 1 and value != int(value):
            raise UserError(f"--{option} {value:g} must be a whole number: {about}")
        given[name] = kinds[name](value * factor)
        if given[name] == 0:
            raise UserError(f"--{option} {value:g} must be at least 1: {about}")
    return Limits(**given)


def _has_screen() -> bool:
    """Whether a browser that is opened here would be seen."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def suggestions(config: Config) -> list[str]:
    """Prompts to choose from: those of the config's prompt file and of the others in its folder."""
    first = locate(config.data_path) if config.data_path else None
    if first is None or first.is_dir():
        return []
    others = sorted(path for path in first.parent.iterdir() if path.suffix in (".txt", ".jsonl") and path != first)
    prompts: dict[str, None] = {}
    for path in (first, *others):
        try:
            stories = (read_stories if path.suffix == ".jsonl" else read_prompts)(path)
        except UserError:
            continue  # another kind of file
        for story in stories[:SUGGESTIONS]:
            prompts.update(dict.fromkeys(story.prompts))
    return list(prompts)[:SUGGESTIONS]
