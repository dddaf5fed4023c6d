"""Several processes: every video is made once, by whichever, and is the one that a single process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import REPOSITORY, Outcome
from tests.frames import read_frames
from utils.distributed import Ranks

PROMPTS = ["a red ball", "a blue cube", "a yellow fish"]


def torchrun(program: Path, *args, processes: int = 2, cwd: Path) -> Outcome:
    command = [sys.executable, str(REPOSITORY / "scripts/several_processes.py"), str(processes), str(program),
               *map(str, args)]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_two_processes_make_every_video_once_as_one_process_does(tiny_yaml, tmp_path, run_script):
    """Then again with one prompt more: the first three are skipped, and the second process has nothing to do."""
    prompts, arguments = tmp_path / "prompts.txt", [tiny_yaml, tmp_path / "prompts.txt", "--num-output-frames", 3]
    prompts.write_text("\n\n".join(PROMPTS))
    first = torchrun(REPOSITORY / "inference.py", *arguments, "--output-folder", "two", "--profile", "profile.json",
                     cwd=tmp_path)
    assert first.code == 0, first.err
    videos = sorted((tmp_path / "two").glob("*.mp4"))
    assert [video.name for video in videos] == ["0000-0.mp4", "0001-0.mp4", "0002-0.mp4"]
    assert sorted(path.suffix for path in (tmp_path / "two").iterdir()) == 3 * [".json"] + 3 * [".mp4"]
    assert first.out.count("frames/s end to end") == 1 and "3 videos, 9 latents, 27 frames" in first.out
    made = [[video["name"] for video in rank["videos"]]
            for rank in json.loads((tmp_path / "profile.json").read_text())["ranks"]]
    assert sorted(made) == [["0000-0", "0002-0"], ["0001-0"]]

    # With as many threads as each of the two: of how many there are last digits may depend.
    alone = run_script("inference.py", *arguments, "--output-folder", "one", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert alone.code == 0, alone.err
    for video in videos:
        np.testing.assert_array_equal(read_frames(video), read_frames(tmp_path / "one" / video.name))

    times = [video.stat().st_mtime_ns for video in videos]
    prompts.write_text("\n".join([*PROMPTS, "a green frog"]))
    second = torchrun(REPOSITORY / "inference.py", *arguments, "--output-folder", "two", cwd=tmp_path)
    assert second.code == 0, second.err
    for video in videos:
        assert second.err.count(f"{video.relative_to(tmp_path)} is there already, skipped") == 1
    assert [video.stat().st_mtime_ns for video in videos] == times
    assert "1 video, 3 latents, 9 frames" in second.out
    assert len(read_frames(tmp_path / "two/0003-0.mp4")) == 9


@pytest.mark.parametrize("args, words", [
    (["--prompt", "a ball", "sed=1"], "error: the command line: unknown key sed; did you mean seed?"),
    (["--prompt", "a ball", "generator_ckpt=nope.pt"], "error: generator_ckpt=nope.pt: no such file"),
])
def test_bad_input_is_said_once_and_ends_every_process(tiny_yaml, tmp_path, args, words):
    """Both where every process finds it for itself and where the first finds it for all."""
    outcome = torchrun(REPOSITORY / "inference.py", tiny_yaml, *args, cwd=tmp_path)
    assert words in outcome.error_line() and outcome.err.count("\n") == 1, outcome.err


# What each of two processes does; its results go to a file of its own.
VERBS = """
import json, os, sys
from pathlib import Path
from utils.distributed import Ranks
from utils.errors import UserError

folder, results = Path(sys.argv[1]), {}
ranks = Ranks()

def fail():
    assert ranks.is_first
    raise UserError("no such file")

def leave_or_find():
    mark = folder / "left behind"
    found = mark.exists()
    mark.touch()
    return found

results["first"] = ranks.from_first(lambda: f"made by {ranks.rank}")
for verb in (ranks.from_first, ranks.first_then_others):
    try:
        verb(fail)
    except UserError as error:
        results[verb.__name__] = str(error)
results["found"] = ranks.first_then_others(leave_or_find)
results["share"] = ranks.share(list("abcde"))
results["gathered"] = ranks.gather(f"from {ranks.rank}")
ranks.close()
(folder / f"{ranks.rank}.json").write_text(json.dumps(results))
"""


def test_what_the_first_process_makes_or_fails_at_reaches_the_others(tmp_path):
    (tmp_path / "verbs.py").write_text(VERBS)
    outcome = torchrun(tmp_path / "verbs.py", tmp_path, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for results in (first, second):
        assert results["first"] == "made by 0"
        assert results["from_first"] == results["first_then_others"] == "no such file"
    assert (first["found"], second["found"]) == (False, True)
    assert first["share"] + second["share"] == ["a", "c", "e", "b", "d"]
    assert (first["gathered"], second["gathered"]) == (["from 0", "from 1"], [])


@given(st.integers(1, 9), st.lists(st.integers(), max_size=30))
def test_shares_cover_every_item_once_and_are_even(world, items):
    ranks = [object.__new__(Ranks) for _ in range(world)]
    for rank, process in enumerate(ranks):
        process.rank, process.world = rank, world
    shares = [process.share(list(enumerate(items))) for process in ranks]
    assert sorted(item for share in shares for item in share) == list(enumerate(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_there_is_nothing_to_wait_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks()
    assert ranks.is_first and ranks.share([1, 2]) == [1, 2] and ranks.gather("a") == ["a"]
    assert ranks.from_first(lambda: 5) == 5 and ranks.first_then_others(lambda: 6) == 6
    with pytest.raises(ZeroDivisionError):
        ranks.first_then_others(lambda: 1 / 0)
    ranks.close()
