"""Checkpoints that are missing, cut short, of another model, or not to be trusted: one line, exit code 2."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import inference
from tests.conftest import assert_complains

BALL = ("--prompt", "a red ball")


@pytest.fixture
def own_model(tiny_folder, tmp_path) -> Path:
    """A copy of the very small model that a test may spoil, in `models/tiny`; `own_yaml` uses it."""
    shutil.copytree(tiny_folder / "tiny", tmp_path / "models/tiny", ignore=shutil.ignore_patterns("*.merged-*"))
    return tmp_path / "models/tiny"


@pytest.fixture
def own_yaml(own_model, tiny_yaml, tmp_path) -> Path:
    text = tiny_yaml.read_text()
    path = tmp_path / "own.yaml"
    tiny_models = next(line.split(": ")[1] for line in text.splitlines() if line.startswith("wan_folder"))
    path.write_text(text.replace(tiny_models, str(own_model.parent)))
    return path


@pytest.fixture
def complains(run_here, own_yaml):
    """Runs inference.py with the model of `own_model` and asserts that it ends with one line that has those words."""

    def run(*words: str, args=()) -> None:
        assert_complains(run_here(inference, *BALL, *args, config=own_yaml), *words)

    return run


@pytest.mark.parametrize("key, what", [("generator_ckpt", "nothing.pt"), ("lora_ckpt", "nothing.pt"),
                                       ("vae_ckpt", "nothing.pth"), ("model_name", "nothing")])
def test_missing_file_says_which_where_and_how_to_get_it(run_here, tmp_path, key, what):
    outcome = run_here(inference, *BALL, f"{key}={what}")
    assert_complains(outcome, f"{key}={what}: no such", f"looked in {tmp_path} and ", "bash scripts/download.sh")
    assert "Loaded" not in outcome.err and not list((tmp_path / "videos").iterdir())


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                                  "vae/config.json", "transformer/config.json", "text_encoder/config.json",
                                  "tokenizer/tokenizer.json", "vae", "text_encoder", "tokenizer"])
def test_missing_part_of_the_base_model(complains, own_model, name):
    part = own_model / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    complains(part if part.suffix == ".json" and "config" in name else own_model / name.split("/")[0],
              "bash scripts/download.sh")


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_missing_part_of_a_native_base_model(run_here, tmp_path, name):
    base = tmp_path / "wan_models/Wan2.1-T2V-1.3B"
    base.mkdir(parents=True)
    for other in {"Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"} - {name}:
        (base / other).write_bytes(b"")
    outcome = run_here(inference, *BALL, "wan_folder=wan_models", "model_name=Wan2.1-T2V-1.3B")
    assert_complains(outcome, base.relative_to(tmp_path) / name, "no such file", "bash scripts/download.sh")


@pytest.mark.parametrize("name", ["models/longlive_base.pt", "models/lora.pt",
                                  "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_truncated_file(complains, own_model, name, kept):
    whole = (own_model / name).read_bytes()
    part = whole[: int(kept * len(whole)) if isinstance(kept, float) else kept]
    (own_model / name).write_bytes(part)
    complains(own_model / name, f"{len(part):,} bytes", "fetch it again")


@pytest.mark.parametrize("contents", [b"<!DOCTYPE html><html>Not Found</html>", b"hello\n",
                                      b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"])
def test_something_else_in_a_checkpoint_s_place(complains, own_model, contents):
    (own_model / "models/longlive_base.pt").write_bytes(contents)
    complains(own_model / "models/longlive_base.pt", "checkpoint", f"{len(contents)} bytes", "fetch it again")


class Code:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_the_marker_of_the_next_test_works(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["generator_ckpt", "lora_ckpt", "vae_ckpt"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_checkpoint_with_code_in_it_is_refused_and_not_run(complains, tmp_path, form, key):
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    contents = {"generator": {"model.patch_embedding.weight": torch.ones(2), "more": Code(marker)}}
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    complains(path, *(["not a checkpoint of plain tensors"] if form == "pickle" else ["refused", "system", "run code"]),
              "source that you trust", args=[f"{key}={path}"])
    assert not marker.exists()


def spoil(path: Path, key: str, change) -> None:
    contents = torch.load(path)
    change(contents[key])
    torch.save(contents, path)


WEIGHT = "model.blocks.0.ffn.0.weight"


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop(WEIGHT), ["1 parameters missing, such as blocks.0.ffn.0.weight"]),
    (lambda state: state.update({"model.blocks.7.new": torch.ones(2)}), ["1 unknown, such as blocks.7.new"]),
    (lambda state: state.update({WEIGHT: torch.ones(3, 5)}), ["blocks.0.ffn.0.weight has shape [3, 5]", "[64, 32]"]),
    (lambda state: state.update({WEIGHT: 5}), ["blocks.0.ffn.0.weight has shape int", "[64, 32]"]),
    (lambda state: state.clear(), ["parameters missing"]),
])
def test_generator_that_does_not_fit(complains, own_model, change, words):
    spoil(own_model / "models/longlive_base.pt", "generator", change)
    complains(own_model / "models/longlive_base.pt", *words, "is it the right file for this model?")


@pytest.mark.parametrize("args, words", [
    (["use_ema=true"], ["no generator_ema in it, it has generator", "set use_ema: false"]),
    (["generator_ckpt=models/tiny/models/lora.pt"], ["no generator or model in it, it has generator_lora"]),
    (["lora_ckpt=models/tiny/models/longlive_base.pt"], ["match nothing in the generator"]),
    (["vae_ckpt=models/tiny/models/lora.pt"], ["does not fit the model"]),
    (["vae=taehv"], ["vae_ckpt=None", "taew2_1.pth"]),
    (["vae=taehv", "vae_ckpt=models/tiny/models/lora.pt"], ["not a tiny decoder"]),
])
def test_checkpoint_of_another_thing(complains, args, words):
    complains(*words, args=args)


LORA = "base_model.model.blocks.0.ffn.0.lora_A.weight"


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update({"base_model.model.blocks.7.ffn.0.lora_A.weight": torch.ones(4, 2)}),
     ["1 of 21 LoRA modules match nothing in the generator, such as blocks.7.ffn.0"]),
    (lambda state: state.pop(LORA), ["1 of 20 LoRA modules match nothing", "blocks.0.ffn.0"]),
    (lambda state: state.update({LORA: torch.ones(4)}), ["1 of 20 LoRA modules match nothing", "blocks.0.ffn.0"]),
    (lambda state: state.update({LORA: torch.ones(4, 5)}), ["blocks.0.ffn.0 is 64×5, the generator's is 64×32"]),
    (lambda state: state.clear(), ["no LoRA in it"]),
])
def test_lora_that_does_not_fit(complains, own_model, change, words):
    spoil(own_model / "models/lora.pt", "generator_lora", change)
    complains(own_model / "models/lora.pt", *words)


def test_lora_of_another_rank(complains, own_model):
    complains(own_model / "models/lora.pt", "has rank 4, but adapter.rank=8", "set adapter.rank=4",
              args=["adapter.rank=8"])
