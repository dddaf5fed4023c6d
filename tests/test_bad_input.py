"""What users get wrong: each has exit code 2 and one line that says what was given, what is needed, how to mend it."""

import json

import pytest
import torch

import inference
import interactive_inference
from tests.conftest import REPOSITORY, assert_complains
from tests.frames import read_frames

BALL = ("--prompt", "a red ball")


# Configs

@pytest.mark.parametrize("text, words", [
    ("heigth: 32", ["unknown key heigth", "did you mean height?"]),
    ("model_kwargs:\n  sink: 3", ["unknown key model_kwargs.sink", "did you mean model_kwargs.sink_size?"]),
    ("sink_size: 3", ["unknown key sink_size", "did you mean model_kwargs.sink_size?"]),
    ("zzzzzz: 3", ["unknown key zzzzzz", "configs/inference.yaml"]),
    ("height: tall", ["height: Value 'tall'", "Integer"]),
    ("height: 32.5", ["height: Value '32.5'", "Integer"]),
    ("height:", ["height", "None"]),
    ("denoising_step_list: 1000", ["denoising_step_list=1000 must be a list, such as [1000, 750, 500, 250]"]),
    ("denoising_step_list:", ["denoising_step_list=None must be a list"]),
    ("model_kwargs: 12", ["model_kwargs holds keys of its own", "12"]),
    ("lora_ckpt: 12", ["lora_ckpt must be a path"]),
    ("lora_ckpt: [{pth: a.pt}]", ["lora_ckpt: unknown key pth", "did you mean path?"]),
    ("height", ["YAML mapping"]),
    ("- height\n- width", ["YAML mapping"]),
    ("12", ["YAML mapping"]),
    ("height: 32\n  width: 48", ["not valid YAML", "line 2"]),
    ("height: [32", ["not valid YAML", "line 1"]),
    ("height: 32\nheight: 48", ["not valid YAML", "duplicate key height"]),
    ("height: ${nothing}", ["height", "nothing"]),
    ("output_folder: !!python/object/apply:os.getcwd []", ["not valid YAML", "python/object"]),
])
def test_config_that_makes_no_sense(run_here, tmp_path, text, words):
    path = tmp_path / "my.yaml"
    path.write_text(text + "\n")
    assert_complains(run_here(inference, *BALL, config=path), *words)


def test_config_that_is_not_utf8_names_the_line(run_here, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("height: 32\n# größer\n".encode("latin-1"))
    assert_complains(run_here(inference, *BALL, config=path), f"{path}, line 2: not UTF-8", "save the file as UTF-8")


def test_config_that_is_missing_or_a_folder(run_here, tmp_path):
    assert_complains(run_here(inference, "nothing.yaml", config=None), "config=nothing.yaml: no such file", tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    assert_complains(run_here(inference, "folder.yaml", config=None), "config=folder.yaml is a folder")
    assert_complains(run_here(inference, "--config", tmp_path, config=None), "is a folder, not a file")


@pytest.mark.parametrize("override, words", [
    ("num_output_frames=7", ["num_output_frames=7", "num_frame_per_block=3; use 6 or 9", "--seconds round up"]),
    ("num_output_frames=0", ["at least 1 latent"]),
    ("num_output_frames=999999999999999999999", ["longer than 1,000,000 s", "lower num_output_frames"]),
    ("model_kwargs.sink_size=4", ["sink_size=4", "num_frame_per_block=3; use 3 or 6"]),
    ("model_kwargs.local_attn_size=13", ["local_attn_size=13 minus sink_size=3", "use 12 or 15"]),
    ("model_kwargs.local_attn_size=2", ["local_attn_size=2", "-1 to keep everything"]),
    ("model_kwargs.local_attn_size=-2", ["local_attn_size=-2", "-1 to keep everything"]),
    ("height=40", ["height=40", "multiple of 16; use 32 or 48"]),
    ("width=0", ["width=0", "multiple of 16; use 16 or 32"]),
    ("device=tpu", ["device=tpu", "auto, cpu, cuda or cuda:N"]),
    ("device=mps", ["device=mps", "auto, cpu, cuda or cuda:N"]),
    ("dtype=int8", ["dtype=int8", "bfloat16"]),
    ("denoising_step_list=[250,500]", ["falling steps", "[1000, 750, 500, 250]"]),
    ("switch_frame_indices=[6,3]", ["must rise"]),
    ("seed=-1", ["seed=-1", "0 to 2^63-1"]),
    ("model_kwargs.sink-size=3", ["model_kwargs.sink-size", "did you mean model_kwargs.sink_size?"]),
    ("heigth=32", ["unknown key heigth", "did you mean height?"]),
])
def test_value_out_of_range(run_here, override, words):
    assert_complains(run_here(inference, *BALL, override), *words)


@pytest.mark.parametrize("override, words", [
    ("device=gpu", ["device=gpu", "auto, cpu, cuda or cuda:N"]),
    ("text_encoder_device=gpu", ["device=gpu", "auto, cpu, cuda or cuda:N"]),
    ("use_ema=true", ["no generator_ema in it", "set use_ema: false"]),
])
def test_what_can_not_work_is_said_before_the_plan(run_here, override, words):
    outcome = run_here(inference, *BALL, override)
    assert_complains(outcome, *words)
    assert outcome.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu_here(run_here, device):
    assert_complains(run_here(inference, *BALL, f"device={device}"), f"device={device}", "no CUDA GPU", "device=cpu")


@pytest.mark.parametrize("args, frames", [(["--num-output-frames", 7], 25), (["--seconds", 1], 16),
                                          (["--seconds", 0.01], 1), (["--num-output-frames", 1], 1)])
def test_length_on_the_command_line_is_rounded_up_and_trimmed(run_here, tmp_path, args, frames):
    assert run_here(inference, *BALL, *args).code == 0
    assert len(read_frames(tmp_path / "videos/0000-0.mp4")) == frames


def test_default_length_is_checked_only_where_it_counts(run_here, tmp_path):
    blocks = ["num_frame_per_block=4", "model_kwargs.sink_size=4"]
    assert_complains(run_here(inference, *BALL, *blocks), "num_output_frames=6 is not a multiple")
    for length, frames in ((["--seconds", 1], 16), (["--num-output-frames", 5], 17)):
        assert run_here(inference, *BALL, *blocks, *length, "--overwrite").code == 0
        assert len(read_frames(tmp_path / "videos/0000-0.mp4")) == frames


# Command lines

@pytest.mark.parametrize("args, words", [
    (["--prompt", ""], ["--prompt: prompt 1 is empty"]),
    (["--prompt", " \t "], ["--prompt: prompt 1 is empty"]),
    (["--prompt", "\udce4"], ["--prompt: prompt 1", "half a character"]),
    ([*BALL, "--seconds", "0"], ["--seconds 0.0 must be above 0"]),
    ([*BALL, "--seconds", "nan"], ["--seconds nan"]),
    ([*BALL, "--seconds", "1e308"], ["--seconds 1e+308", "at most 1,000,000"]),
    ([*BALL, "--seconds", "long"], ["--seconds", "long"]),
    ([*BALL, "--num-output-frames", "0"], ["--num-output-frames 0", "at least 1 latent"]),
    ([*BALL, "--num-samples", "0"], ["num_samples=0", "at least 1"]),
    ([*BALL, "--seed", "-1"], ["seed=-1"]),
    ([*BALL, "--seeds", "1"], ["--seeds", "did you mean --seed?"]),
    ([*BALL, "--seed"], ["--seed", "expected one argument"]),
    ([*BALL, "--seconds", "1", "--num-output-frames", "6"], ["--seconds or --num-output-frames, not both"]),
    ([*BALL, "--seconds", "1", "num_output_frames=6"], ["--seconds or num_output_frames=6, not both"]),
    ([*BALL, "--seed", "1", "seed=2"], ["--seed or seed=2, not both"]),
    ([*BALL, "prompts.txt"], ["--prompt or prompts.txt, not both"]),
    ([*BALL, "data_path=prompts.txt"], ["--prompt or data_path=prompts.txt, not both"]),
    (["prompts.txt", "prompts.txt"], ["one prompt file at a time"]),
    ([*BALL, "other.yaml"], ["one config at a time", "other.yaml"]),
    (["seed"], ["seed: no such file", "key=value"]),
    (["a red ball"], ["a red ball: no such file", "--prompt TEXT"]),
    (["a red\nball.txt"], ["a red ball.txt: no such file"]),
    ([], ["no prompts", "--prompt TEXT"]),
    (["data_path=nothing.txt"], ["data_path=nothing.txt: no such file", "--prompt TEXT"]),
])
def test_command_line_that_makes_no_sense(run_here, tmp_path, args, words):
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    assert_complains(run_here(inference, *args), *words)
    assert not list(tmp_path.glob("videos/*"))


@pytest.mark.parametrize("contents", ["", "hello", "height: 32", "[]", '{"height": 32}',
                                      '{"request": {"prompts": []}, "config": {}}', '{"request": 1, "config": 2}'])
def test_remake_of_something_else(run_here, tiny_yaml, tmp_path, contents):
    (tmp_path / "my.json").write_text(contents)
    assert_complains(run_here(inference, "--remake", "my.json"), "--remake my.json: not a description of a video",
                     "beside an .mp4")


def test_remake_of_the_video_itself(run_here, tmp_path):
    assert run_here(inference, *BALL, "--seconds", "0.3").code == 0
    line = run_here(inference, "--remake", "videos/0000-0.mp4", config=None).error_line()
    assert "videos/0000-0.mp4: not a description of a video; give the .json that lies beside" in line


def test_missing_file_names_each_folder_once(run_here, tmp_path, monkeypatch):
    assert f"(looked in {tmp_path} and {REPOSITORY})" in run_here(inference, "nothing.txt").error_line()
    assert "looked in" not in run_here(inference, "/nothing.txt").error_line()
    monkeypatch.chdir(REPOSITORY)
    assert f"(looked in {REPOSITORY});" in run_here(inference, "nothing.txt").error_line()


def test_remake_of_nothing(run_here, tmp_path):
    assert_complains(run_here(inference, "--remake", "nothing.json", config=None), "nothing.json: no such file",
                     "beside an .mp4")
    assert_complains(run_here(inference, "--remake", tmp_path, config=None), "is a folder")


@pytest.mark.parametrize("key, value", [("prompts", [{"prompt": "a"}]), ("prompts", "a"), ("frames", None),
                                        ("latents", "many"), ("weights", None), ("seed", -1), ("latents", 3)])
def test_remake_of_a_description_that_was_spoiled(run_here, tmp_path, key, value):
    assert run_here(inference, *BALL).code == 0
    path = tmp_path / "videos/0000-0.json"
    about = json.loads(path.read_text())
    about["request"][key] = value
    path.write_text(json.dumps(about))
    outcome = run_here(inference, "--remake", path, "--output-folder", "again", config=None)
    assert_complains(outcome, f"--remake {path}: not a description of a video")


@pytest.mark.parametrize("args", [BALL, ["prompts.txt"], ["--seconds", "2"], ["--seed", "3"], ["seed=3"],
                                  ["--num-samples", "2"], ["num_output_frames=6"]])
def test_remake_and_what_it_would_overrule(run_here, tmp_path, args):
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    assert_complains(run_here(inference, "--remake", "videos/0000-0.json", *args), "--remake", "leave out", args[0])


def test_remake_with_other_blocks(run_here, tmp_path):
    assert run_here(inference, *BALL, "--seconds", "0.3").code == 0
    outcome = run_here(inference, "--remake", "videos/0000-0.json", "--output-folder", "again", "num_frame_per_block=6",
                       "model_kwargs.sink_size=6", "model_kwargs.local_attn_size=12", config=None)
    assert_complains(outcome, "another num_frame_per_block than 6")


@pytest.mark.parametrize("args, words", [
    (["--output-folder", "file"], ["--output-folder", "can't write in file", "a file, not a folder"]),
    (["--output-folder", "file/below"], ["--output-folder", "can't write in file/below"]),
    (["output_folder=file/below"], ["--output-folder", "can't write in file/below"]),
    (["--profile", "file/profile.json"], ["--profile", "can't write in file"]),
    (["--profile", "."], ["--profile", "is a folder"]),
])
def test_place_that_can_not_be_written(run_here, tmp_path, args, words):
    (tmp_path / "file").write_text("mine")
    outcome = run_here(inference, *BALL, *args)
    assert_complains(outcome, *words)
    assert "Loaded" not in outcome.err and (tmp_path / "file").read_text() == "mine"


def test_profile_on_a_full_disk_keeps_the_video(run_here, tmp_path):
    assert_complains(run_here(inference, *BALL, "--profile", "/dev/full"), "--profile /dev/full", "No space left")
    assert len(read_frames(tmp_path / "videos/0000-0.mp4")) == 21


def test_ffmpeg_is_missed_before_anything_is_computed(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    outcome = run_here(inference, *BALL)
    assert_complains(outcome, "IMAGEIO_FFMPEG_EXE", tmp_path / "nothing", "no such program", "unset it")
    assert "Loaded" not in outcome.err


def test_paths_may_look_like_yaml(run_here, tmp_path):
    (tmp_path / "my: [prompts] #1.txt").write_text("a red ball\n")
    assert run_here(inference, "my: [prompts] #1.txt", "--output-folder", "out: {a=b} #2").code == 0
    assert (tmp_path / "out: {a=b} #2/0000-0.mp4").exists()


# Prompt files

def test_prompt_file_with_a_mark_windows_lines_and_blanks(run_here, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red ball\r\n\r\n   \r\n  a blue cube  \r\n")
    assert run_here(inference, "prompts.txt", "--num-output-frames", "3").code == 0
    told = [json.loads(path.read_text())["plan"][0]["prompt"] for path in sorted((tmp_path / "videos").glob("*.json"))]
    assert told == ["a red ball", "a blue cube"]


@pytest.mark.parametrize("contents, words", [
    (b"", ["no prompts in it", "one a line"]),
    (b"\n  \r\n\t\n", ["no prompts in it"]),
    (b"\xef\xbb\xbf", ["no prompts in it"]),
    (b"a red ball\na gr\xfcn ball\n", ["line 2: not UTF-8", "0xfc", "save the file as UTF-8"]),
    ("a red ball".encode("utf-16"), ["line 1: not UTF-8"]),
    (b'{"prompts": ["a", "b"]}\n', ["JSONL", "interactive_inference.py"]),
    (b'\n {"prompts": ["a", "b"\n', ["JSONL", "interactive_inference.py"]),
])
def test_prompt_file_that_is_none(run_here, tmp_path, contents, words):
    (tmp_path / "prompts.txt").write_bytes(contents)
    assert_complains(run_here(inference, "prompts.txt"), "prompts.txt", *words)


def test_prompt_may_hold_any_character_but_a_newline(run_here, tmp_path):
    prompts = ["a\u2028b", "a\x0bb", "a\x85b", "{soft light} a red ball", "x\x00y"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    assert run_here(inference, "prompts.txt", "--num-output-frames", "3").code == 0
    told = [json.loads(path.read_text("utf-8"))["plan"][0]["prompt"]
            for path in sorted((tmp_path / "videos").glob("*.json"))]
    assert told == prompts


def test_prompt_too_long_says_which_and_how_long_and_where_it_is_cut(run_here, tmp_path):
    outcome = run_here(inference, "--prompt", "the dragon " + "and a red ball " * 3000, "--num-output-frames", "3")
    assert outcome.code == 0
    line = next(line for line in outcome.err.splitlines() if "tokens" in line)
    assert "Prompt 'the dragon and a red ball" in line and "the first 512 are used; cut off: '" in line
    assert int(line.split(" tokens")[0].split()[-1]) > 512 and len(line) < 250


def test_names_from_any_prompt_are_valid_and_distinct(run_here, tmp_path):
    long = "a very long story about " + "mountains/rivers/" * 20
    prompts = ["🎈🎈🎈", "一个红色的球在草地上弹跳" * 12, "كرة حمراء تقفز على العشب", "../../etc/passwd",
               "///", "a/b", "a b", long + "one", long + "two", "𝐀" * 100, "CON: <x> | ? *", "-rf", "."]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    outcome = run_here(inference, "prompts.txt", "save_with_index=false", "--num-output-frames", "3",
                       "denoising_step_list=[1000]")
    assert outcome.code == 0, outcome.err
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert len(names) == 2 * len(prompts) and all(len(name.encode()) < 240 for name in names)
    assert all(not set(name) & set('/\\:*?"<>|') and name[0] not in ".-" for name in names)
    told = [json.loads((tmp_path / "videos" / name).read_text("utf-8"))["plan"][0]["prompt"]
            for name in names if name.endswith(".json")]
    assert sorted(told) == sorted(prompts)


# JSONL

@pytest.mark.parametrize("line, words", [
    ('{"prompts": ["a"', ["not valid JSON", "each line is one object"]),
    ("{'prompts': ['a']}", ["not valid JSON"]),
    ('{"prompts": ' * 3000, ["not valid JSON"]),
    ('["a", "b"]', ["expected a JSON object", "got list"]),
    ('"a"', ["expected a JSON object", "got str"]),
    ('{"promts": ["a"]}', ["unknown key promts", "did you mean prompts?"]),
    ('{"prompts": ["a"], "where": "x"}', ["unknown key where", "known are prompts"]),
    ("{}", ["prompts must be a list of at least one text"]),
    ('{"seed": 1}', ["prompts must be a list of at least one text"]),
    ('{"prompts": []}', ["prompts must be a list of at least one text"]),
    ('{"prompts": "a"}', ["prompts must be a list", '"a"']),
    ('{"prompts": ["a", 5]}', ["prompts must be a list", "5"]),
    ('{"prompts": ["a", "  "]}', ["prompt 2 is empty"]),
    ('{"prompts": ["a", "\\ud800"]}', ["prompt 2 has half a character"]),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [6]}', ["switch index 6 is outside", "6 latents"]),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [0]}', ["must rise from above 0"]),
    ('{"prompts": ["a", "b", "c"], "switch_frame_indices": [4, 3]}', ["must rise", "[4, 3]"]),
    ('{"prompts": ["a", "b"], "switch_frame_indices": [1, 3]}', ["2 prompts need 1 switch indices, got 2"]),
    ('{"prompts": ["a", "b"], "switch_frame_indices": ["3"]}', ["list of whole numbers"]),
    ('{"prompts": ["a", "b"], "switch_frame_indices": 3}', ["list of whole numbers"]),
    ('{"prompts": ["a", "b", "c"]}', ["3 prompts need at least as many blocks, but the video has 2", "9 latents"]),
    ('{"prompts": ["a"], "switch_frame_indices": [], "durations": [1]}', ["not both"]),
    ('{"prompts": ["a"], "num_output_frames": 6, "durations": [1]}', ["not both"]),
    ('{"prompts": ["a", "b"], "durations": [1, -1]}', ["seconds above 0", "[1, -1]"]),
    ('{"prompts": ["a", "b"], "durations": [1, NaN]}', ["seconds above 0"]),
    ('{"prompts": ["a", "b"], "durations": [1, 1e9]}', ["at most 1,000,000"]),
    ('{"prompts": ["a", "b"], "durations": [1]}', ["2 prompts need 2 durations, got 1"]),
    ('{"prompts": ["a", "b"], "durations": [0.01, 1]}', ["prompt 1 lasts 0.01 s", "at least 0.75 s (one block)"]),
    ('{"prompts": ["a", "b"], "durations": [0.8125, 0.01]}', ["prompt 2 lasts 0.01 s", "at least 0.75 s (one block)"]),
    ('{"prompts": ["a"], "num_output_frames": 0}', ["num_output_frames", "above 0"]),
    ('{"prompts": ["a"], "num_output_frames": "12"}', ["num_output_frames must be", 'got "12"']),
    ('{"prompts": ["a", "b"], "switch_frame_indices": "3"}', ["list of whole numbers", 'got "3"']),
    ('{"prompts": ["a"], "durations": "3"}', ["list of seconds", 'got "3"']),
    ('{"prompts": ["a"], "num_output_frames": 1000000000000}', ["longer than"]),
    ('{"prompts": ["a"], "seed": "x"}', ["seed must be a whole number", 'got "x"']),
    ('{"prompts": ["a"], "seed": -1}', ["seed must be a whole number", "got -1"]),
    ('{"prompts": ["a"], "seed": 1.5}', ["seed must be a whole number"]),
    ('{"prompts": ["a"], "name": "a/b"}', ["'a/b' can't be a file name"]),
    ('{"prompts": ["a"], "name": ".."}', ["'..' can't be a file name"]),
    ('{"prompts": ["a"], "name": ""}', ["'' can't be a file name"]),
    ('{"prompts": ["a"], "name": "x.partial"}', ["can't be a file name"]),
    ('{"prompts": ["a"], "name": "' + "𝐀" * 60 + '"}', ["can't be a file name", "at most 200 bytes"]),
    ('{"prompts": ["a"], "name": 5}', ["name must be a text"]),
])
def test_story_that_makes_no_sense_is_named_by_file_and_line(run_here, tmp_path, line, words):
    (tmp_path / "stories.jsonl").write_text('{"prompts": ["fine"]}\n\n' + line + "\n", "utf-8")
    outcome = run_here(interactive_inference, "stories.jsonl")
    assert_complains(outcome, "stories.jsonl, line 3: ", *words)
    assert not list(tmp_path.glob("videos/*"))


@pytest.mark.parametrize("contents, words", [
    ("", ["no stories in it", '{"prompts"']),
    (" \n\n", ["no stories in it"]),
    ("a red ball\na blue cube\n", ["text, not JSONL", "inference.py"]),
])
def test_story_file_that_is_none(run_here, tmp_path, contents, words):
    (tmp_path / "stories.jsonl").write_text(contents)
    assert_complains(run_here(interactive_inference, "stories.jsonl"), "stories.jsonl: ", *words)


def test_two_switches_in_one_block_are_told_and_the_last_wins(run_here, tmp_path):
    story = {"prompts": ["a", "b", "c"], "switch_frame_indices": [2, 3]}
    (tmp_path / "stories.jsonl").write_text(json.dumps(story))
    outcome = run_here(interactive_inference, "stories.jsonl")
    assert outcome.code == 0
    assert "never shown, another prompt begins in the same block and wins: from latent 2: b" in outcome.err
    plan = json.loads((tmp_path / "videos/0000-0.json").read_text())["plan"]
    assert [(part["prompt"], part["latent"]) for part in plan] == [("a", 0), ("c", 3)]


def test_switches_of_the_config_that_do_not_fit_are_told(run_here, tmp_path):
    outcome = run_here(interactive_inference, *BALL, "--prompt", "b", "switch_frame_indices=[40]")
    assert outcome.code == 0
    assert "switch_frame_indices=[40] do not fit 2 prompts in 6 latents; split evenly" in outcome.err
