"""Long videos whose prompt changes while they run."""

import sys

from utils.cli import Task, guarded, make_parser, parse
from utils.prompts import Story, read_stories

EXAMPLES = """examples:
  python interactive_inference.py                                    the small model that comes with this repository
  python interactive_inference.py --prompt "a red ball on a meadow" --prompt "a blue ball on a meadow" --seconds 20
  python interactive_inference.py my_stories.jsonl
  python interactive_inference.py configs/interactive.yaml my_stories.jsonl   (first: bash scripts/download.sh)
  python interactive_inference.py configs/interactive.yaml global_sink=false model_kwargs.use_infinite_attention=true

Each line of the JSONL is one video and stands alone:
  {"prompts": ["a red ball", "a blue ball"]}                                        split evenly
  {"prompts": ["a red ball", "a blue ball"], "switch_frame_indices": [42]}          in latents
  {"prompts": ["a red ball", "a blue ball"], "durations": [5, 10.5], "seed": 3, "name": "balls"}
Also: "num_output_frames" (latents). A prompt takes hold at the first block that starts at or after its time.
Videos that exist already are skipped; one that was cut off is made again from its start."""


def stories(task: Task) -> list[Story]:
    """Each line is a video; prompts on the command line are one video together."""
    if task.prompts:
        return [Story(task.prompts, where="--prompt")]
    return read_stories(task.data_path())


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Makes a video of each story: prompts that follow each other without a cut.", EXAMPLES,
                         "configs/demo_interactive.yaml", "the first prompt; repeat it for those that follow")
    task = parse(parser, argv)
    asked = [] if task.remake else stories(task)
    from pipeline.run import run  # after the arguments: torch takes seconds to import

    run(task, asked)


if __name__ == "__main__":
    sys.exit(guarded(main))
