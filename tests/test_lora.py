"""LoRAs: merged as PEFT merges them, of every form that they come in; one that does not fit is an error."""

import dataclasses
import itertools
import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import TINY, assert_same
from utils.checkpoint import merge_loras
from utils.config import LoraFile
from utils.errors import UserError
from wan.model import CausalWan

State = dict[str, Tensor]
LINEARS = r"blocks\..*\.(q|k|v|o|ffn\.0|ffn\.2)"
RANK = 4


def adapted(base: State, seed: int, alpha: float = RANK):
    """The generator with a random LoRA on it, by PEFT."""
    model = CausalWan(TINY.generator)
    model.load_state_dict(base)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=alpha, target_modules=LINEARS))
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.3)
    return model


def keys_of(model) -> State:
    """A LoRA in PEFT's names, `.default` inside."""
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.fixture
def lora_file(base, tmp_path):
    """lora_file(seed) → LoraFile of a random LoRA, as it is published; lora_file(seed, change) changes it before."""

    def write(seed: int, change=lambda state: state, alpha: float = RANK) -> LoraFile:
        path = tmp_path / f"lora{seed}.pt"
        plain = {name.replace(".default", ""): value for name, value in keys_of(adapted(base, seed)).items()}
        torch.save({"generator_lora": change(plain)}, path)
        return LoraFile(str(path), rank=RANK, alpha=alpha)

    return write


# LoRA


@pytest.mark.parametrize("alpha", [RANK, 10.0])
def test_merging_is_pefts_own_merge(base, tmp_path, alpha):
    model = adapted(base, 1, alpha)
    torch.save({"generator_lora": keys_of(model)}, tmp_path / "lora.pt")
    merged = merge_loras(base, [LoraFile(str(tmp_path / "lora.pt"), rank=RANK, alpha=alpha)])
    assert_same(merged, model.merge_and_unload().state_dict(), 1e-6)
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in base if re.fullmatch(LINEARS + r"\.weight", name)}


def test_several_loras_add_up_by_weight_in_any_order(base, lora_file):
    loras = [dataclasses.replace(lora_file(1), weight=0.5), dataclasses.replace(lora_file(2), weight=-2.0, alpha=6.0),
             lora_file(3)]
    merged = merge_loras(base, loras)
    for order in itertools.permutations(loras):
        assert_same(merge_loras(base, list(order)), merged, 1e-5)
    alone = [merge_loras(base, [lora]) for lora in (lora_file(1), lora_file(2, alpha=6.0), lora_file(3))]
    summed = {name: base[name] + sum(factor * (state[name] - base[name])
                                     for factor, state in zip((0.5, -2.0, 1.0), alone, strict=True)) for name in base}
    assert_same(merged, summed, 1e-5)


def test_no_lora_leaves_the_weights_as_they_are(base):
    assert_same(merge_loras(base, []), base, 0)


@pytest.mark.parametrize("form", ["with .default", "flat", "safetensors", "native names"])
def test_loras_of_every_form_are_one(base, tmp_path, form, lora_file):
    plain = keys_of(adapted(base, 1))
    short = {name.removeprefix("base_model.model."): value for name, value in plain.items()}
    path = tmp_path / f"other.{'safetensors' if form == 'safetensors' else 'pt'}"
    save_file(plain, path) if form == "safetensors" else torch.save(
        {"with .default": {"generator_lora": plain}, "flat": plain, "native names": {"generator_lora": short}}[form],
        path)
    assert_same(merge_loras(base, [LoraFile(str(path), rank=RANK, alpha=RANK)]), merge_loras(base, [lora_file(1)]), 0)


def test_critics_lora_is_ignored(base, tmp_path, lora_file):
    lora = lora_file(1)
    expected = merge_loras(base, [lora])
    contents = torch.load(lora.path) | {"critic_lora": keys_of(adapted(base, 2)), "step": 700}
    torch.save(contents, tmp_path / "both.pt")
    assert_same(merge_loras(base, [dataclasses.replace(lora, path=str(tmp_path / "both.pt"))]), expected, 0)


def test_number_of_applied_modules_is_logged(base, lora_file, caplog):
    caplog.set_level(logging.INFO)
    merge_loras(base, [dataclasses.replace(lora_file(1), weight=0.5)])
    assert re.search(r"lora1\.pt: 20 of 20 modules applied, weight 0\.5", caplog.text)
    assert "blocks.1.ffn.2" not in caplog.text
    merge_loras(base, [lora_file(1)], verbose=True)
    assert "blocks.1.ffn.2" in caplog.text


def renamed(state: State) -> State:
    return {name.replace("blocks.1.", "layers.1."): value for name, value in state.items()}


def halved(state: State) -> State:
    return {name: value for name, value in state.items() if "0.ffn.0.lora_B" not in name}


def with_scale(state: State) -> State:
    return state | {"base_model.model.blocks.0.ffn.0.lora_magnitude_vector": torch.ones(4)}


def narrow(state: State) -> State:
    return {name: value[:, :-1] if "0.ffn.0.lora_A" in name else value for name, value in state.items()}


@pytest.mark.parametrize(("change", "message"), [
    (renamed, r"10 of 20 LoRA modules match nothing in the generator, such as layers\.1\."),
    (halved, r"1 of 20 LoRA modules match nothing in the generator, such as blocks\.0\.ffn\.0;"),
    (with_scale, r"1 of 21 LoRA modules match nothing in the generator, such as .*lora_magnitude_vector"),
    (narrow, r"blocks\.0\.ffn\.0 is 64×31, the generator's is 64×32"),
    (lambda state: {}, r"no LoRA in it"),
])
def test_lora_that_does_not_fit_is_an_error(base, lora_file, change, message):
    with pytest.raises(UserError, match=r"lora1\.pt: " + message):
        merge_loras(base, [lora_file(1, change)])


def test_lora_of_another_rank_says_what_to_set(base, lora_file):
    with pytest.raises(UserError, match=r"lora1\.pt: has rank 4, but adapter\.rank=256; set adapter\.rank=4 and "):
        merge_loras(base, [dataclasses.replace(lora_file(1), rank=256)])


def test_missing_lora_is_named(base, tmp_path):
    with pytest.raises(UserError, match=r"lora_ckpt=.*nothing\.pt: no such file"):
        merge_loras(base, [LoraFile(str(tmp_path / "nothing.pt"), rank=4, alpha=4)])


def test_generator_given_as_lora_is_an_error(base, tmp_path):
    torch.save({"generator": base}, tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base\.pt: 1 of 1 LoRA modules match nothing .*such as generator;"):
        merge_loras(base, [LoraFile(str(tmp_path / "base.pt"), rank=4, alpha=4)])
