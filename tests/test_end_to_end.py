"""Whole videos, through the front-ends' own code, with a very small random model on the CPU."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import inference
import interactive_inference
from demo.random_checkpoint import write
from pipeline.engine import Engine
from tests.conftest import REPOSITORY, TINY
from tests.frames import decode_errors, read_frames


@pytest.fixture
def make(tiny_yaml, monkeypatch, tmp_path):
    """Runs a front-end in this process: make(inference, "--prompt", "a ball") → the folder with the videos."""
    monkeypatch.chdir(tmp_path)

    def run(front_end, *args, folder: str = "out") -> Path:
        front_end.main([str(tiny_yaml), "--output-folder", folder, *map(str, args)])
        return tmp_path / folder

    return run


def test_video_plays_and_is_described(make):
    folder = make(inference, "--prompt", "a red ball", "--num-output-frames", 7)
    frames = read_frames(folder / "0000-0.mp4")
    assert frames.shape == (4 * 7 - 3, 32, 48, 3)
    assert decode_errors(folder / "0000-0.mp4") == ""
    about = json.loads((folder / "0000-0.json").read_text())
    assert about["complete"] and about["frames"] == 25 and about["request"]["seed"] == 0
    assert about["plan"][0]["prompt"] == "a red ball"
    assert sorted(path.name for path in folder.iterdir()) == ["0000-0.json", "0000-0.mp4"]


def test_seconds_give_exactly_that_many_frames(make):
    assert len(read_frames(make(inference, "--prompt", "a", "--seconds", 1.25) / "0000-0.mp4")) == 20


def test_same_frames_alone_or_third_in_a_file_and_again(make, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue cube\n\na yellow fish\na red ball\n")
    in_file = read_frames(make(inference, prompts, folder="file") / "0002-0.mp4")
    alone = read_frames(make(inference, "--prompt", "a red ball", folder="alone") / "0000-0.mp4")
    again = read_frames(make(inference, "--prompt", "a red ball", folder="again") / "0000-0.mp4")
    assert (alone == again).all() and (alone == in_file).all()


def test_longer_video_begins_with_the_same_frames(make):
    short = read_frames(make(inference, "--prompt", "a", "--num-output-frames", 6, folder="short") / "0000-0.mp4")
    long = read_frames(make(inference, "--prompt", "a", "--num-output-frames", 12, folder="long") / "0000-0.mp4")
    assert (short == long[: len(short)]).all() and len(long) == 45


def test_prompt_and_seed_change_the_video(make):
    first = read_frames(make(inference, "--prompt", "a", folder="1") / "0000-0.mp4").astype(int)
    other_prompt = read_frames(make(inference, "--prompt", "b", folder="2") / "0000-0.mp4")
    other_seed = read_frames(make(inference, "--prompt", "a", "--seed", 1, folder="3") / "0000-0.mp4")
    other_sample = read_frames(make(inference, "--prompt", "a", "--num-samples", 2, folder="4") / "0000-1.mp4")
    for other in (other_prompt, other_seed, other_sample):
        assert np.abs(first - other).max() > 8


def test_video_before_a_switch_is_that_of_the_first_prompt(make):
    single = read_frames(make(inference, "--prompt", "a", "--num-output-frames", 9, folder="1") / "0000-0.mp4")
    switched = make(interactive_inference, "--prompt", "a", "--prompt", "b", "--num-output-frames", 9,
                    "switch_frame_indices=[6]", folder="2") / "0000-0.mp4"
    switched = read_frames(switched)
    assert (single[:21] == switched[:21]).all()
    assert (single[21:] != switched[21:]).any()


def test_lines_of_a_story_file_may_differ_in_everything(make, tmp_path, caplog):
    stories = tmp_path / "stories.jsonl"
    stories.write_text(
        '{"prompts": ["a", "b", "c"], "num_output_frames": 9, "seed": 5, "name": "three"}\n\n'
        '{"prompts": ["a", "b"], "durations": [1, 0.5]}\n'
        '{"prompts": ["a", "b"], "switch_frame_indices": [4]}\n'
    )
    caplog.set_level("INFO")
    folder = make(interactive_inference, stories)
    assert len(read_frames(folder / "three.mp4")) == 33
    assert len(read_frames(folder / "0001-0.mp4")) == 24
    plan = json.loads((folder / "0002-0.json").read_text())["plan"]
    assert [(part["asked_latent"], part["latent"], part["frame"]) for part in plan] == [(0, 0, 0), (4, 6, 21)] or \
        [part["latent"] for part in plan] == [0]
    assert "from latent    3" in caplog.text and "three.mp4" in caplog.text


@pytest.mark.parametrize("length", [["--seconds", "1.3125"], ["--num-output-frames", "6"], ["num_output_frames=6"]])
def test_length_on_the_command_line_goes_before_that_of_a_story(make, tmp_path, caplog, length):
    (tmp_path / "stories.jsonl").write_text('{"prompts": ["a", "b"], "num_output_frames": 12}\n'
                                            '{"prompts": ["a", "b"], "durations": [20, 10]}\n')
    caplog.set_level("INFO")
    folder = make(interactive_inference, "stories.jsonl", *length)
    assert [len(read_frames(folder / f"000{line}-0.mp4")) for line in (0, 1)] == [21, 21]
    assert "line 1: made 1.3 s long as the command line says, in place of its own 2.8 s\n" in caplog.text
    assert "line 2: made 1.3 s long as the command line says, in place of its own 30.0 s; durations" in caplog.text


def test_second_run_skips_what_is_there_and_overwrite_does_not(make, caplog):
    caplog.set_level("INFO")
    video = make(inference, "--prompt", "a") / "0000-0.mp4"
    made = video.stat().st_mtime_ns
    make(inference, "--prompt", "a")
    assert video.stat().st_mtime_ns == made and "skipped" in caplog.text
    make(inference, "--prompt", "a", "--overwrite")
    assert video.stat().st_mtime_ns > made


def test_another_request_never_overwrites_a_video(make):
    folder = make(inference, "--prompt", "a")
    before = (folder / "0000-0.mp4").read_bytes()
    make(inference, "--prompt", "b")
    assert (folder / "0000-0.mp4").read_bytes() == before
    assert (folder / "0000-0-2.mp4").exists()
    make(inference, "--prompt", "b")
    assert not (folder / "0000-0-3.mp4").exists()


def test_another_run_that_takes_the_name_meanwhile_keeps_it(make, monkeypatch, caplog):
    """Both are planned before either is made."""
    load, others = Engine.from_config, [("--prompt", "b")]

    def meanwhile(*args) -> Engine:
        if others:
            make(inference, *others.pop())
        return load(*args)

    monkeypatch.setattr(Engine, "from_config", meanwhile)
    folder = make(inference, "--prompt", "a")
    told = {path.stem: json.loads(path.read_text())["plan"][0]["prompt"] for path in folder.glob("*.json")}
    assert told == {"0000-0": "b", "0000-0-2": "a"}
    assert "0000-0.mp4 was made by another run meanwhile; this video is out/0000-0-2.mp4" in caplog.text


def test_unfinished_video_is_made_again(make):
    folder = make(inference, "--prompt", "a")
    about = json.loads((folder / "0000-0.json").read_text())
    (folder / "0000-0.json").write_text(json.dumps(about | {"complete": False}))
    make(inference, "--prompt", "a")
    assert json.loads((folder / "0000-0.json").read_text())["complete"]
    assert not (folder / "0000-0-2.mp4").exists()


def test_description_alone_makes_the_same_video_again(make, tmp_path, monkeypatch):
    folder = make(interactive_inference, "--prompt", "a", "--prompt", "b", "--seed", 3, "--seconds", 1.2,
                  "denoising_step_list=[1000,500]")
    elsewhere = tmp_path / "elsewhere"
    inference.main(["--remake", str(folder / "0000-0.json"), "--output-folder", str(elsewhere)])
    assert (read_frames(elsewhere / "0000-0.mp4") == read_frames(folder / "0000-0.mp4")).all()


def test_progress_bar_ends_at_the_length(make, capsys, recwarn):
    """Sums of a block's seconds would be more than that at such a rate."""
    make(inference, "--prompt", "a", "--num-output-frames", 12, "fps=17")
    err = capsys.readouterr().err
    assert "100%|" in err and "| 2.6/2.6 s [" in err
    assert not [warning for warning in recwarn if "clamping" in str(warning.message)]


def test_profile_has_every_stage(make, tmp_path, capsys):
    make(interactive_inference, "--prompt", "a", "--prompt", "b", "--profile", tmp_path / "profile.json")
    totals = json.loads((tmp_path / "profile.json").read_text())["totals"]
    assert {"denoise", "re-cache", "decode", "encode"} <= set(totals["stages"])
    assert totals["frames"] == 21 and totals["frames_per_second"] > 0 and totals["peak_host_bytes"] > 0
    assert "frames/s end to end" in capsys.readouterr().out


def test_profile_is_written_where_there_is_nothing_to_make(make, tmp_path):
    make(inference, "--prompt", "a")
    make(inference, "--prompt", "a", "--profile", tmp_path / "profile.json")
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["totals"]["videos"] == 0 and profile["ranks"][0]["videos"] == []


def test_endless_works_in_both_front_ends(make):
    relative = "model_kwargs.use_infinite_attention=true"
    args = ["--num-output-frames", 24]
    absolute = read_frames(make(inference, "--prompt", "a", *args, folder="1") / "0000-0.mp4")
    endless = read_frames(make(inference, "--prompt", "a", *args, relative, folder="2") / "0000-0.mp4")
    assert len(endless) == 93 and (absolute[:45] == endless[:45]).all() and (absolute[45:] != endless[45:]).any()
    switched = make(interactive_inference, "--prompt", "a", "--prompt", "b", *args, relative, folder="3")
    assert len(read_frames(switched / "0000-0.mp4")) == 93


ORIGINALS = ["longlive_inference", "longlive_interactive_inference", "longlive_inference_infinity"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_original_configs_run_unedited(name, tmp_path, monkeypatch):
    """In a folder laid out as the original's: wan_models/, longlive_models/, prompts. Only smaller and shorter."""
    sizes = dataclasses.replace(TINY, lora_rank=256)
    write(tmp_path / "wan_models/Wan2.1-T2V-1.3B", sizes, seed=0, device="cpu")
    (tmp_path / "longlive_models/prompts").mkdir(parents=True)
    (tmp_path / "wan_models/Wan2.1-T2V-1.3B/models").rename(tmp_path / "longlive_models/models")
    (tmp_path / "longlive_models/prompts/vidprom_filtered_extended.txt").write_text("a ball\n")
    (tmp_path / "longlive_models/prompts/interactive_example.jsonl").write_text('{"prompts": ["a", "b"]}\n')
    monkeypatch.chdir(tmp_path)
    front_end = interactive_inference if "interactive" in name else inference
    front_end.main(["--config_path", str(REPOSITORY / f"tests/data/{name}.yaml"), "--num-output-frames", "6",
                    "height=32", "width=48", "device=cpu"])
    (video,) = tmp_path.glob("videos/*/0000-0.mp4")
    assert len(read_frames(video)) == 21
