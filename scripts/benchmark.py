"""Speed and memory at full size, noise to encoded pixels, with random weights: no checkpoint is needed.

Speed and memory do not depend on the values of the weights. Text encoding is left out: prompts are random embeddings.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.random_checkpoint import SIZES, randomise
from pipeline.engine import Engine
from pipeline.timeline import Timeline
from utils.checkpoint import fill
from utils.config import Config, load_config
from utils.device import pick_device, pick_dtype
from utils.report import peak_gpu, resident
from utils.video import Mp4Writer
from wan.geometry import frames_of
from wan.model import CausalWan
from wan.vae import WanVAE

PROMPT_TOKENS = 120


class RandomText:
    """Stands in for the text encoder: embeddings of the right shape, the same for the same prompt."""

    max_tokens = 512

    def __init__(self, dim: int):
        self.dim = dim

    def overflow(self, prompt: str) -> tuple[int, str]:
        return PROMPT_TOKENS, ""

    def __call__(self, prompt: str) -> Tensor:
        return torch.randn(1, PROMPT_TOKENS, self.dim, generator=torch.Generator().manual_seed(len(prompt)))


class RandomEngine(Engine):
    """An engine whose weights are drawn, not loaded."""

    def __init__(self, config: Config, size: str):
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        random = torch.Generator(device).manual_seed(0)
        sizes = SIZES[size]
        with torch.device("meta"):
            generator, vae = CausalWan(sizes.generator), AutoencoderKLWan.from_config(sizes.vae)
        fill(generator, randomise(generator, str(device), random), "random weights", dtype)
        fill(vae, randomise(vae, str(device), random), "random weights", dtype)
        super().__init__(config, generator, WanVAE(vae), lambda: RandomText(sizes.generator.text_dim), device)

    @property
    def text_encoder(self) -> RandomText:
        return self._load_text()


@dataclass
class Result:
    """One video. Times in ms; medians are over steady blocks, those made once the window was full."""

    name: str
    latents: int
    frames: int
    passes_per_block: float  # denoising steps and the clean pass
    decode_per_block: float
    recache: float | None
    block_wall: float
    frames_per_second: float
    first_frame: float
    switch_to_frame: float | None  # from set_prompt to the first frames under the new prompt on the host
    encode_per_block: float
    peak_gpu_gib: float
    host_gib: float  # at the end of the video
    host_growth_mib: float  # since the window was full


def make(engine: Engine, name: str, timeline: Timeline, folder: Path) -> Result:
    """Makes one video as a front-end does, and times it."""
    config = engine.config
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    start = time.perf_counter()
    session = engine.session(seed=0)
    full = min((config.window or 0) // config.num_frame_per_block + 1, len(timeline) - 1)
    walls, switches, previous, host = [], [], None, 0
    with Mp4Writer(folder / f"{name}.mp4", width=config.width, height=config.height, fps=config.fps,
                   crf=config.crf) as video:
        for prompt in timeline:
            began = time.perf_counter()
            session.set_prompt(prompt)
            frames = session.step()
            walls.append(time.perf_counter() - began)
            if previous not in (None, prompt):
                switches.append(walls[-1])
            previous = prompt
            video.write(frames)
            host = resident() if len(walls) == full else host
    total = time.perf_counter() - start
    stages = session.watch.read()
    denoise, decode = stages["denoise"], stages["decode"]
    clean = statistics.median(stages["clean pass"][full - 1:] or [0.0])

    def ms(seconds: list[float]) -> float:
        return round(1000 * statistics.median(seconds), 1)

    return Result(
        name, timeline.latents, timeline.frames, round(ms(denoise[full:]) + 1000 * clean, 1), ms(decode[full:]),
        ms(stages["re-cache"]) if "re-cache" in stages else None, ms(walls[full:]),
        round(timeline.frames / total, 2), ms(walls[:1]), ms(switches) if switches else None,
        round(1000 * video.seconds / len(walls), 1), round(peak_gpu(engine.device) / 2**30, 3),
        round(resident() / 2**30, 3), round((resident() - host) / 2**20, 1),
    )


def check_no_waiting(engine: Engine) -> str:
    """Makes blocks with PyTorch's check for synchronising calls set to raise; a switch and an eviction among them."""
    if engine.device.type != "cuda":
        return "no GPU: not checked"
    session = engine.session(seed=0)
    session.set_prompt("a")
    session.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in range(1, 8):
            session.set_prompt("a" if block < 6 else "bb")
            session.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronising call in 7 blocks (with a re-cache and evictions)"


def table(results: list[Result]) -> str:
    rows = [("", [result.name for result in results])]
    for key in list(asdict(results[0]))[1:]:
        rows.append((key.replace("_", " "), ["-" if v is None else f"{v}" for v in (getattr(r, key) for r in results)]))
    return "\n".join(f"{name:20}" + "".join(f"{value:>18}" for value in values) for name, values in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, such as height=720")
    parser.add_argument("--latents", type=int, nargs="+", default=[60, 240], help="lengths of single-prompt videos")
    parser.add_argument("--switches", type=int, default=5, help="prompt switches of a further video; 0: none")
    parser.add_argument("--size", choices=SIZES, default="full", help="toy: the shapes of the shipped small model")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args()
    config = load_config(None, args.overrides)
    block = config.num_frame_per_block
    engine = RandomEngine(config, args.size)
    folder = Path(tempfile.mkdtemp(prefix="longlive-benchmark-"))

    def single(latents: int) -> Timeline:
        return Timeline.build(["a"], [], block=block, frames=frames_of(latents))

    print(f"{torch.cuda.get_device_name(engine.device) if engine.device.type == 'cuda' else 'CPU'}, torch "
          f"{torch.__version__}, {config.height}x{config.width}, {args.size} size", flush=True)
    print(check_no_waiting(engine), flush=True)
    results = [make(engine, f"single-{n}", single(n), folder) for n in args.latents]
    if args.switches:
        n = args.latents[-1]
        prompts = ["a" * (i + 1) for i in range(args.switches + 1)]
        timeline = Timeline.evenly(prompts, block=block, frames=frames_of(n))
        results.append(make(engine, f"switches-{n}", timeline, folder))
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps({"device": str(engine.device), "config": config.to_dict(),
                                         "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
