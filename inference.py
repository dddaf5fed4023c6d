"""Long videos from one prompt each."""

import sys

from utils.cli import Task, guarded, make_parser, parse
from utils.prompts import Story, read_prompts

EXAMPLES = """examples:
  python inference.py                                        the small model that comes with this repository
  python inference.py --prompt "a red ball bounces on a meadow" --seconds 10
  python inference.py my_prompts.txt --num-samples 2 --seed 7
  python inference.py configs/inference.yaml my_prompts.txt  the full model (first: bash scripts/download.sh)
  python inference.py configs/endless.yaml --seconds 600
  python inference.py configs/inference.yaml height=720 width=1280 model_kwargs.local_attn_size=9
  python inference.py --remake videos/long/0000-0.json --output-folder elsewhere

A latent is 4 frames (the first: 1), a block is num_frame_per_block latents: 3 latents are 9 frames at the start of a
video and 12 after it. Videos that exist already are skipped; one that was cut off is made again from its start.
Every key of the config is in configs/inference.yaml."""


def stories(task: Task) -> list[Story]:
    """Each prompt is a video of its own."""
    if task.prompts:
        return [Story([prompt], where="--prompt") for prompt in task.prompts]
    return read_prompts(task.data_path())


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Makes a video of each prompt.", EXAMPLES, "configs/demo.yaml",
                         "what the video shows; repeat it for more videos")
    task = parse(parser, argv)
    asked = [] if task.remake else stories(task)
    from pipeline.run import run  # after the arguments: torch takes seconds to import

    run(task, asked)


if __name__ == "__main__":
    sys.exit(guarded(main))
