"""Speed and memory at full size, noise to encoded pixels, with random weights: no checkpoint is needed.

Speed and memory do not depend on the values of the weights. Text encoding is left out: prompts are random embeddings.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_weights import SIZES
from pipeline.engine import Engine
from scripts.benchmarking import gpu_use, picture, processes, report, roofline
from scripts.benchmarking.operations import operations_of_a_block
from scripts.benchmarking.random_engine import random_engine, with_config
from scripts.benchmarking.videos import Video, make, timeline
from utils.cli import guarded
from utils.config import Config, load_config
from utils.device import pick_dtype
from utils.errors import UserError

# What each choice says in the config.
PRECISIONS = {"auto": [], "bf16": ["dtype=bfloat16"], "fp16": ["dtype=float16"], "fp32": ["dtype=float32"],
              "fp8": ["precision=fp8"]}
DECODERS = {"wan": ["vae=wan"], "taehv": ["vae=taehv", "vae_ckpt=random"]}
RESOLUTIONS = {"full": [], "toy": ["height=112", "width=192"]}
BUSY_BLOCKS = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config: height=720 width=1280")
    parser.add_argument("--latents", type=int, nargs="+", default=[60, 240], help="lengths of single-prompt videos")
    parser.add_argument("--switches", type=int, default=5, help="prompt switches of a further video; 0: none")
    parser.add_argument("--long", type=int, default=1000, metavar="N",
                        help="latents of two videos, absolute and endless, that show whether a block's time and memory "
                             "grow; 0: none")
    parser.add_argument("--also", nargs="+", action="append", default=[], metavar=("N", "key=value"),
                        help="a further video of N latents, of the same weights under other settings: 36 height=720 "
                             "width=1280, or 240 vae=taehv vae_ckpt=random; after a short one; may be repeated")
    parser.add_argument("--cold", type=int, default=2, metavar="N",
                        help="fresh processes that are timed, one after the other: from the second on they find "
                             "Triton's kernels compiled and files in memory; 0: none")
    parser.add_argument("--gpus", type=int, default=1, metavar="N",
                        help="with 2 or more: also as many processes at once, one a GPU")
    parser.add_argument("--decoder", choices=DECODERS, default="wan")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--size", choices=SIZES, default="full", help="toy: the small model's shapes, at 192×112")
    parser.add_argument("--roofline", type=float, default=0.2, metavar="SECONDS",
                        help="spent on each way of each operation; 0: no roofline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results there, and FILE's name.png")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="only draw the picture of results saved before")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE",
                        help="only print what counts of results saved before, beside each other")
    parser.add_argument(processes.CHILD, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def check_also(also: list[list[str]], overrides: list[str]) -> None:
    """Raises UserError where a further video can't be made, before the others are."""
    for latents, *settings in also:
        if not latents.isdecimal() or not int(latents):
            raise UserError(f"--also {latents}: its length in latents comes first: --also 36 height=720 width=1280")
        load_config(None, [*overrides, *settings])


def first_frame_and_at_once(args: argparse.Namespace, overrides: list[str]) -> tuple[dict, dict | None]:
    """What fresh processes show; made before this one takes memory of a GPU."""
    options = ["--size", args.size, *overrides]
    cold = [processes.cold_start(options) for _ in range(args.cold)]
    return {"cold": cold}, processes.at_once(options, args.gpus, args.latents[-1]) if args.gpus > 1 else None


def make_videos(engine: Engine, args: argparse.Namespace, overrides: list[str], folder: Path) -> Iterator[Video]:
    def under(settings: list[str]) -> Engine:
        return with_config(engine, load_config(None, [*overrides, *settings]), args.size)

    def first(engine: Engine, name: str) -> Video:
        """A short one, which finds nothing ready and leaves all ready for the next."""
        latents = (engine.config.window or 0) + 2 * engine.config.num_frame_per_block
        return make(engine, name, timeline(engine, latents), folder)

    yield first(engine, "first")
    for n in args.latents:
        yield make(engine, f"single-{n}", timeline(engine, n), folder)
    if args.switches:
        n = args.latents[-1]
        yield make(engine, f"switches-{n}", timeline(engine, n, args.switches + 1), folder)
    if args.long:
        for name, endless in (("absolute", "false"), ("endless", "true")):
            one = under([f"model_kwargs.use_infinite_attention={endless}"])
            yield make(one, f"{name}-{args.long}", timeline(one, args.long), folder)
    for number, (latents, *settings) in enumerate(args.also, 1):
        one = under(settings)
        print(f"also-{number}-{latents}: {' '.join(settings)}", flush=True)
        first(one, "warm")
        yield make(one, f"also-{number}-{latents}", timeline(one, int(latents)), folder)


def hold_against_roofline(engine: Engine, args: argparse.Namespace, steady: Video,
                          switching: Video | None) -> dict[str, Any] | None:
    config, device = engine.config, engine.device
    if config.window is None or not args.roofline:
        return None
    operations = operations_of_a_block(config, args.size)
    seconds = roofline.time_all(operations, device, pick_dtype(config.dtype, device),
                                args.roofline if device.type == "cuda" else args.roofline / 10)
    measured = steady.stages | {"block": steady.block}
    if switching is not None:
        measured["re-cache"] = switching.stages.get("re-cache")
    return roofline.summary(operations, seconds, measured)


def run(config: Config, args: argparse.Namespace, overrides: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The whole benchmark. Yields the results so far, for JSON, after each part; whole after the last one."""
    results: dict[str, Any] = {"config": config.to_dict(), "python": platform.python_version(), "also": args.also}
    results["first_frame"], results["at_once"] = first_frame_and_at_once(args, overrides)
    engine = random_engine(config, args.size)
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    results["title"] = (f"{gpu}, torch {torch.__version__}, {config.height}×{config.width}, {args.size} size, "
                        f"precision {args.precision}, decoder {config.vae}, {engine.attention}")
    yield results
    videos: dict[str, Video] = {}
    for video in make_videos(engine, args, overrides, folder):
        print(f"{video.name}: {video.frames_per_second} frames/s", flush=True)
        videos[video.name] = video
        results["videos"] = [asdict(video) for video in videos.values()]
        yield results
    steady, switching = videos[f"single-{args.latents[-1]}"], videos.get(f"switches-{args.latents[-1]}")
    results["steady"] = steady.name
    results["first_frame"]["warm_ms"] = results["videos"][1]["first_frame"]
    results["switch_to_frame_ms"] = switching.switch_to_frame if switching else None
    results["flatness"] = {name: video.flatness for name, video in videos.items() if video.flatness is not None}
    # After the videos: the profiler slows what follows it, and for the roofline cuDNN learns faster algorithms.
    results["waiting"] = gpu_use.check_no_waiting(engine)
    results["busy"] = gpu_use.busy_share(engine, BUSY_BLOCKS, folder)
    yield results
    results["roofline"] = hold_against_roofline(engine, args, steady, switching)
    yield results


def draw(results: dict[str, Any], path: Path) -> None:
    print(f"picture: {path}" if picture.draw(results, path) else "matplotlib is not installed: no picture", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.draw:
        return draw(json.loads(args.draw.read_text("utf-8")), args.draw.with_suffix(".png"))
    if args.compare:
        return print(report.side_by_side({file.stem: json.loads(file.read_text("utf-8")) for file in args.compare}))
    overrides = [*RESOLUTIONS[args.size], *PRECISIONS[args.precision], *DECODERS[args.decoder], *args.overrides]
    config = load_config(None, overrides)
    check_also(args.also, overrides)
    with tempfile.TemporaryDirectory(prefix="longlive-benchmark-") as folder:
        if args.child:
            return processes.serve(lambda: random_engine(config, args.size), Path(folder))
        for results in run(config, args, overrides, Path(folder)):
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(report.text(results), flush=True)
    if args.json:
        draw(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(guarded(main))
