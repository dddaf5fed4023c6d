"""A run does without libraries that take seconds to import, from its arguments to its video."""

import subprocess
import sys

from tests.conftest import REPOSITORY

SLOW = ["accelerate", "diffusers", "huggingface_hub", "peft", "sympy", "torch._dynamo", "torch._inductor",
        "transformers"]
PROGRAM = f"""
import sys
import torch
with_torch = set(sys.modules)
{{imports}}
print("needless:", *(name for name in {SLOW} if name in sys.modules and name not in with_torch))
"""


def needless(imports: str, *args: str) -> str:
    """The slow libraries that a process has imported after these statements, and did not for torch alone."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(imports=imports), *args], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("needless:").strip()


def test_a_video_is_made_without_slow_libraries(tiny_yaml, videos):
    assert needless("import inference; inference.main(sys.argv[1:])", str(tiny_yaml), "--prompt", "a red ball") == ""
    assert len(list(videos.glob("*.mp4"))) == 1


def test_so_are_the_server_and_the_benchmark_started():
    assert needless("import live.run, scripts.benchmark") == ""
