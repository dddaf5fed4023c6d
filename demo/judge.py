"""The judge: reads off a few seconds of video what they show. It has learned from drawn clips alone, some of them
through the VAE, and knows nothing of the generator.

    python -m demo.judge train --out demo/judge.safetensors --device cuda
    python -m demo.judge validate --device cuda --out judge.json
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.canvas import HEIGHT, WIDTH
from demo.world import CATEGORIES, CHOICES
from utils.cli import guarded
from utils.paths import find_file

WEIGHTS = Path(__file__).parent / "judge.safetensors"
VAE = Path(__file__).parent / "checkpoint/vae"

WINDOW = 40  # frames, 2.5 s: as long as any motion needs to be told from the others
SHORTEST = 8  # frames that show all but motion and camera
STRIDE = 2  # every so many frames are looked at

COUNT = "count"  # how many subjects there are: 0, 1, 2
ATTRIBUTES = (*CATEGORIES, COUNT)
SIZES = {name: len(CHOICES[name]) for name in CATEGORIES} | {COUNT: 3}
MOVING = ("motion", "camera")  # what only a whole window shows
APPEARANCE = tuple(name for name in ATTRIBUTES if name not in MOVING)
MAP = 5 * 4 * 6  # positions of the last map of a whole window, in time, rows and columns
OF_SUBJECT = ("subject", "colour", "motion")  # what a clip without a subject does not have


class Network(nn.Module):
    """Convolutions on each frame, then over time and space, pooled; one linear layer for each attribute. Motion and
    camera are also read off the map before it is pooled, which needs a whole window."""

    def __init__(self):
        super().__init__()
        self.frame = nn.Sequential(_layer2d(3, 32, 5), _layer2d(32, 64, 3), _layer2d(64, 96, 3))
        self.more = _layer2d(96, 96, 3, stride=1)
        self.nearby = _layer3d(96, 96, stride=(1, 2, 2))
        self.half_second = _layer3d(96, 128, stride=(2, 1, 1))
        self.second = _layer3d(128, 128, stride=(2, 2, 2))
        self.window = _layer3d(128, 128, kernel=(5, 1, 1))
        self.course = nn.Sequential(nn.Conv3d(128, 28, 1), nn.Flatten(), nn.Linear(28 * MAP, 192), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256 + 192 * (name in MOVING), size)
                                    for name, size in SIZES.items()})
        for head in self.heads.values():  # at first every choice is as likely as the others
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames [B, T, 3, H, W] in 0 … 1, T of them STRIDE apart → logits of each attribute [B, choices]; of motion
        and camera for whole windows only."""
        batch, length = frames.shape[:2]
        x = (4 * frames - 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.frame(x)
        x = x + self.more(x)
        x = x.unflatten(0, (batch, length)).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        x = self.second(self.half_second(self.nearby(x)))
        x = x + self.window(x)
        pooled = torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], 1)
        logits = {name: self.heads[name](pooled) for name in APPEARANCE}
        if length == WINDOW // STRIDE:  # where things are, and when, tells how they move
            course = torch.cat([pooled, self.course(x)], 1)
            logits |= {name: self.heads[name](course) for name in MOVING}
        return logits


def _layer2d(inputs: int, outputs: int, kernel: int, stride: int = 2) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


def _layer3d(inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3),
             stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Sequential:
    conv = nn.Conv3d(inputs, outputs, kernel, stride, tuple(k // 2 for k in kernel), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.SiLU())


class Judge:
    """Reads attributes off video.

        judge = Judge.load()
        judge(frames)["colour"]     # int64 [B], indices in CHOICES["colour"]
    """

    def __init__(self, network: Network):
        self.network = network.eval().requires_grad_(False)
        self.device = next(network.parameters()).device

    @classmethod
    def load(cls, path: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> "Judge":
        """The judge of a weights file; it computes in float32."""
        network = Network()
        network.load_state_dict({name: value.float() if value.is_floating_point() else value
                                 for name, value in load_file(path).items()})
        return cls(network.to(device))

    def save(self, path: str | Path) -> None:
        """Writes the weights: matrices in float16, the rest, which is small, as it is."""
        state = {name: (value.half() if value.dim() > 1 else value).contiguous().cpu()
                 for name, value in self.network.state_dict().items()}
        save_file(state, path)

    @torch.inference_mode()
    def probabilities(self, frames: Tensor) -> dict[str, Tensor]:
        """Frames uint8 [B, T, H, W, 3] at 16 fps → of each attribute the probability of each choice [B, choices].

        The last WINDOW frames are looked at. Fewer, from SHORTEST on, show all but motion and camera, which are then
        left out. Where the count is 0, subject, colour and motion mean nothing. Raises ValueError for another shape.
        """
        if frames.dim() != 5 or frames.dtype != torch.uint8 or tuple(frames.shape[2:]) != (HEIGHT, WIDTH, 3):
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, the judge needs uint8 "
                             f"[B, T, {HEIGHT}, {WIDTH}, 3]")
        if frames.shape[1] < SHORTEST:
            raise ValueError(f"{frames.shape[1]} frames are too few, the judge needs {SHORTEST}, and {WINDOW} for "
                             f"motion and camera")
        whole = frames.shape[1] >= WINDOW
        seen = frames[:, -WINDOW:][:, ::STRIDE].to(self.device)
        logits = self.network(seen.permute(0, 1, 4, 2, 3).float() / 255)
        return {name: F.softmax(logits[name].float(), -1) for name in (ATTRIBUTES if whole else APPEARANCE)}

    def __call__(self, frames: Tensor, batch: int = 64) -> dict[str, Tensor]:
        """As `probabilities`, but the most probable choice of each attribute, int64 [B] on the host."""
        parts = [self.probabilities(part) for part in frames.split(batch)]
        return {name: torch.cat([part[name].argmax(-1) for part in parts]).cpu() for name in parts[0]}


def main(argv: list[str] | None = None) -> None:
    from demo import judge_training, judge_validation

    parser = argparse.ArgumentParser(prog="python -m demo.judge", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train it on clips drawn on the way")
    train.add_argument("--out", type=Path, default=WEIGHTS, help="weights; the checkpoint lies beside them")
    train.add_argument("--start", type=Path, help="weights to go on from, instead of from nothing")
    train.add_argument("--steps", type=int, default=9000)
    train.add_argument("--clips", type=int, default=32768, help="drawn once, before the first step")
    train.add_argument("--batch", type=int, default=64)
    train.add_argument("--lr", type=float, default=2e-3)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--seconds-between-reports", type=float, default=8)
    train.add_argument("--seconds-between-saves", type=float, default=30)
    train.add_argument("--test-clips", type=int, default=256)
    validate = commands.add_parser("validate", help="measure how often it is right on fresh clips")
    validate.add_argument("--weights", type=Path, default=WEIGHTS)
    validate.add_argument("--clips", type=int, default=2000)
    validate.add_argument("--mp4-clips", type=int, default=200, help="so many of them also through an MP4")
    validate.add_argument("--seed", type=int, default=1)
    validate.add_argument("--batch", type=int, default=64)
    validate.add_argument("--out", type=Path, default=Path("judge.json"))
    for command in (train, validate):
        command.add_argument("--vae", type=Path, default=VAE, help="folder of a VAE, through which some clips go")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.vae = find_file(str(args.vae / "config.json"), "--vae", "give a folder such as demo/checkpoint/vae").parent
    if args.command == "train":
        if args.start:
            args.start = find_file(str(args.start), "--start", "give weights of a judge, or leave it out")
        judge_training.train(args)
    else:
        args.weights = find_file(str(args.weights), "--weights", "give what python -m demo.judge train wrote")
        judge_validation.validate(args)


if __name__ == "__main__":
    sys.exit(guarded(main))
