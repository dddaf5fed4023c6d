"""Trains the small model from nothing: `python -m demo.train FOLDER --device cuda`.

The stages follow each other; each writes its result into FOLDER, and one that was stopped goes on where it was. The
checkpoint in the released layout is FOLDER/checkpoint. demo/README.md tells what each stage does.
"""

import argparse
import sys
from pathlib import Path

import torch

from demo.training import forcing, generator, vae, witness
from demo.training.curves import plot
from demo.training.export import export, restore
from demo.training.looks import look
from demo.training.ranks import Ranks
from demo.training.witness import find_witness
from utils.cli import guarded
from utils.errors import UserError
from utils.paths import find_file

AFTER = {"witness", "streaming"}  # stages that leave the generator as it is
STAGES = ("vae", "generator", "refined", "distilled", "matched", "witness", "streaming")
STEPS = {"vae": 7000, "generator": 4200, "refined": 3600, "distilled": 1500, "matched": 1500,
         "witness": 2500, "streaming": 5000}

CLIPS = 8192  # drawn for the VAE, and again for the generator and for the witness


def run(stage: str, folder: Path, ranks: Ranks, scale: float, device: str, seed: int) -> None:
    """One stage. scale: of the number of steps and of clips."""
    steps, clips = max(10, round(STEPS[stage] * scale)), max(64, round(CLIPS * min(1, scale)))
    if stage == "vae":
        if ranks.size > 1:
            raise UserError("the VAE is trained on one GPU; leave torchrun out for --stages vae")
        vae.train(folder, steps=steps, device=device, seed=seed, clips=clips)
    elif stage == "witness":
        if ranks.first:
            witness.train(folder, steps=steps, device=device, seed=seed, clips=clips)
        ranks.wait()
    elif stage in generator.PHASES:
        generator.train(folder, ranks, stage, steps=steps, device=device, seed=seed, clips=clips)
    else:
        forcing.train(folder, ranks, stage, steps=steps, device=device, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps; 0.01 to try it out")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT",
                        help="take the stages before --stages from there, such as demo/checkpoint; where only witness "
                             "and streaming are to come, go on with its LoRA")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.start:
        found = find_file(f"{args.start}/vae/config.json", "--start", "give a folder such as demo/checkpoint")
        args.start = found.parent.parent
    if "streaming" in args.stages and "witness" not in args.stages[:args.stages.index("streaming")]:
        find_witness(args.folder)
    torch.backends.cudnn.benchmark = True
    ranks = Ranks()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.start and ranks.first:
        restore(args.start, args.folder, with_lora=set(args.stages) <= AFTER)  # a LoRA is for one generator alone
    ranks.wait()
    for stage in args.stages:
        run(stage, args.folder, ranks, args.scale, args.device, args.seed)
        if stage not in ("vae", "witness") and ranks.first:
            look(args.folder, stage, args.device)
    if not ranks.first:
        return
    plot(args.folder)
    if (args.folder / generator.latest(args.folder)).exists():
        export(args.folder, args.folder / "checkpoint")


if __name__ == "__main__":
    sys.exit(guarded(main))
