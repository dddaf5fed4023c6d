"""How far the judge can be trusted: on fresh drawn clips, worse ones, ones from a VAE and from MP4s, and on others'
captions."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from demo.canvas import HEIGHT, WIDTH
from demo.judge import APPEARANCE, ATTRIBUTES, COUNT, OF_SUBJECT, SHORTEST, SIZES, WINDOW, Judge
from demo.judge_training import Decoder, labels, random_script, worsen
from demo.training.clips import random_manner
from demo.videos import read_video
from demo.world import FPS, draw
from utils.video import Mp4Writer


def validate(args: argparse.Namespace) -> None:
    """Prints a table of how often each attribute is read right, and writes it as JSON."""
    judge = Judge.load(args.weights, args.device)
    random = torch.Generator().manual_seed(args.seed + 2 * 10**6)
    on_device = torch.Generator(args.device).manual_seed(args.seed)
    script = random_script(args.clips, random)
    truth = labels(script)
    decoder = Decoder(args.vae, args.device)
    drawn, worse, loose, decoded, short, packed = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for begin in range(0, args.clips, args.batch):
            some = script[begin:begin + args.batch].to(args.device)
            clips = draw(some, WINDOW).permute(0, 1, 3, 4, 2).contiguous()
            drawn.append(judge(clips))
            short.append(judge(clips[:, :SHORTEST]))
            degraded = worsen(clips.permute(0, 1, 4, 2, 3) / 255, on_device).permute(0, 1, 3, 4, 2)
            worse.append(judge((255 * degraded).round().to(torch.uint8)))
            manner = random_manner(len(some), random, args.device)
            loose.append(judge(draw(some, WINDOW, manner=manner).permute(0, 1, 3, 4, 2).contiguous()))
            decoded.append(judge(decoder(some, manner, on_device).permute(0, 1, 3, 4, 2).contiguous()))
            through = clips[:max(0, args.mp4_clips - begin)].cpu()
            if len(through):
                packed.append(judge(torch.stack([_through_mp4(clip, Path(folder) / "clip.mp4") for clip in through])))
            print(f"{min(begin + args.batch, args.clips)} of {args.clips} clips", flush=True)
    drawn, worse, loose, decoded, short, packed = (_join(parts) for parts in (drawn, worse, loose, decoded, short,
                                                                             packed))
    other = {name: value[torch.randperm(args.clips, generator=random)] for name, value in truth.items()}
    columns = {
        "drawn": _right(drawn, truth), "worsened": _right(worse, truth), "other manner": _right(loose, truth),
        "decoded": _right(decoded, truth), "MP4": _right(packed, truth), f"{SHORTEST} frames": _right(short, truth),
        "shuffled captions": _right(drawn, other), "chance": {name: _chance(truth[name]) for name in ATTRIBUTES},
    }
    print(f"\n{args.clips} clips, {args.mp4_clips} through an MP4; right in %, chance for captions of other clips\n")
    print("| attribute | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in ATTRIBUTES:
        cells = [f"{100 * column[name]:.1f}" if name in column else "–" for column in columns.values()]
        print(f"| {name} ({SIZES[name]}) | " + " | ".join(cells) + " |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"clips": args.clips, "mp4_clips": args.mp4_clips, "right": columns}, indent=1))
    print(f"\n{args.out}", flush=True)


def _through_mp4(clip: Tensor, path: Path) -> Tensor:
    with Mp4Writer(path, width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(clip)
    return torch.from_numpy(read_video(path))


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _right(read: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Share of clips that are read as `truth` says; those without a subject count only for what they have."""
    result = {}
    for name in (n for n in (ATTRIBUTES if "motion" in read else APPEARANCE) if n in read):
        told = truth[name][:len(read[name])]
        counts = truth[COUNT][:len(told)] > 0 if name in OF_SUBJECT else torch.ones_like(told, dtype=torch.bool)
        result[name] = (read[name] == told)[counts].float().mean().item()
    return result


def _chance(values: Tensor) -> float:
    """How often two clips agree."""
    shares = values.bincount().float() / len(values)
    return shares.square().sum().item()
