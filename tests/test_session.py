"""Sessions of a very small model, and every recorded case."""

import dataclasses
import json
import runpy
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.engine import Engine
from pipeline.noise import NoiseSource
from pipeline.session import Session
from tests import parity
from tests.conftest import GOLDEN
from utils.config import Config, ModelKwargs

STEPS = 4


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    return Engine.from_config(Config(
        wan_folder=str(tiny_folder), model_name="tiny",
        generator_ckpt=str(tiny_folder / "tiny/models/longlive_base.pt"), text_encoder_dtype="float32", height=32,
        width=48, device="cpu",
    ))


@pytest.fixture
def make(engine) -> Callable[..., Session]:
    """A session of the very small model: make(seed=0, sink_size=0, global_sink=False, …)."""

    def session(seed: int = 0, sample: int = 0, **changes) -> Session:
        known = {f.name for f in dataclasses.fields(ModelKwargs)}
        kwargs = ModelKwargs(**{key: changes.pop(key) for key in known & changes.keys()})
        config = dataclasses.replace(engine.config, model_kwargs=kwargs, **changes)
        return Session(config, engine.generator, engine.encode, engine.decoder.stream(),
                       NoiseSource(seed, (3, 16, 4, 6), sample))

    return session


@pytest.fixture
def forwards(engine):
    """What goes through the generator: (first latent, number of latents, t) of each forward."""
    seen = []
    hook = engine.generator.register_forward_pre_hook(
        lambda module, args: seen.append((args[2], args[0].shape[1], args[1])))
    yield seen
    hook.remove()


def latents(session: Session, prompts: str, refresh: str = "recache") -> Tensor:
    """Latents of a video, the prompt of each block being one letter."""
    blocks = []
    for prompt in prompts:
        session.set_prompt(prompt, refresh)
        blocks.append(session.step_latents())
    return torch.cat(blocks, 1)


def denoising(session: Session, first: int) -> list[tuple[int, int, float]]:
    return [(first, 3, t) for t in session.steps]


def test_frames_of_each_step(make):
    session = make()
    session.set_prompt("a")
    shapes = [session.step().shape for _ in range(3)]
    assert shapes == [(9, 32, 48, 3), (12, 32, 48, 3), (12, 32, 48, 3)]
    frames = session.step()
    assert frames.dtype == torch.uint8 and frames.device.type == "cpu"
    assert session.position == 12


def test_frames_are_the_decoded_latents(make, engine):
    session = make()
    session.set_prompt("a")
    frames = torch.cat([session.step() for _ in range(3)])
    with torch.inference_mode():
        whole = engine.decoder.stream()(latents(make(), "aaa"))[0].permute(0, 2, 3, 1)
    assert (frames.float() - (whole.clamp(-1, 1) * 0.5 + 0.5) * 255).abs().max() <= 0.5 + 1e-3


def test_no_prompt(make):
    session = make()
    with pytest.raises(ValueError, match="no prompt: call set_prompt"):
        session.step()
    session.set_prompt("a")
    assert torch.equal(session.step_latents(), latents(make(), "a"))


def test_last_block_has_no_clean_pass(make, forwards):
    session = make()
    latents(session, "a")
    assert forwards == denoising(session, 0)


def test_each_block_is_passed_clean_before_the_next(make, forwards):
    session = make(context_noise=7.0)
    latents(session, "aaa")
    assert forwards == [*denoising(session, 0), (0, 3, 7.0), *denoising(session, 3), (3, 3, 7.0),
                        *denoising(session, 6)]


def test_clean_pass_gets_the_finished_latents_without_noise(make, engine):
    given = []
    hook = engine.generator.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    made = latents(make(), "ab")
    hook.remove()
    assert torch.equal(given[STEPS], made[:, :3])
    assert not torch.equal(given[STEPS - 1], made[:, :3])


def test_switch_replaces_the_clean_pass(make, forwards):
    session = make()
    latents(session, "aab")
    assert forwards == [*denoising(session, 0), (0, 3, 0), *denoising(session, 3), (0, 6, 0), *denoising(session, 6)]


@pytest.mark.parametrize(("changes", "blocks", "recached"), [
    ({}, 4, (0, 12)),  # the window is just full
    ({}, 5, (6, 9)),  # the sink stays
    ({}, 9, (18, 9)),
    ({"global_sink": False}, 5, (3, 12)),
    ({"sink_size": 6}, 5, (9, 6)),
    ({"sink_size": 0}, 5, (3, 12)),
    ({"local_attn_size": -1}, 7, (0, 21)),
    ({"local_attn_size": -1, "global_sink": False}, 7, (0, 21)),
    ({"use_infinite_attention": True}, 6, (9, 9)),
])
def test_switch_takes_the_newest_latents_through_the_network_once(make, forwards, changes, blocks, recached):
    session = make(**changes)
    latents(session, "a" * blocks)
    del forwards[:]
    latents(session, "bb")
    first = 3 * blocks
    assert forwards == [(*recached, 0), *denoising(session, first), (first, 3, 0), *denoising(session, first + 3)]


def test_prompt_set_often_between_two_steps_is_recached_once(make, forwards):
    session = make()
    latents(session, "aa")
    del forwards[:]
    for prompt in "bcacb":
        session.set_prompt(prompt)
    last = session.step_latents()
    assert forwards == [(0, 6, 0), *denoising(session, 6)]
    assert torch.equal(last, latents(make(), "aab")[:, 6:])


def test_present_prompt_set_again_changes_nothing(make, forwards):
    plain = make()
    plain.set_prompt("a")
    expected = torch.cat([plain.step_latents() for _ in range(6)], 1)
    count = len(forwards)

    session, blocks = make(), []
    for _ in range(6):
        for prompt in "aba":
            session.set_prompt(prompt)
        blocks.append(session.step_latents())
    assert torch.equal(torch.cat(blocks, 1), expected)
    assert len(forwards) == 2 * count == 2 * (6 * STEPS + 5)


@pytest.mark.parametrize("changes", [{}, {"use_infinite_attention": True}, {"local_attn_size": -1}])
def test_switch_changes_the_blocks_after_it_and_none_before(make, changes):
    single, switched = latents(make(**changes), "aaaaaaa"), latents(make(**changes), "aaaaabb")
    assert torch.equal(single[:, :15], switched[:, :15])
    assert (single[:, 15:18] - switched[:, 15:18]).abs().max() > 1e-3
    assert (single[:, 18:] - switched[:, 18:]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"use_infinite_attention": True}, {"local_attn_size": -1}])
@pytest.mark.parametrize("blocks", [1, 4, 6])
def test_switch_that_keeps_the_cache(make, forwards, changes, blocks):
    session = make(**changes)
    latents(session, "a" * blocks)
    del forwards[:]
    kept = latents(session, "b", "keep")
    first = 3 * blocks
    assert forwards == [(first - 3, 3, 0), *denoising(session, first)]  # one clean pass, of the last block alone

    plain = make(**changes)  # by hand: the last block's clean pass under its own prompt, then other cross-attention
    latents(plain, "a" * blocks)
    with torch.inference_mode():
        plain._clean_pass(plain._latents[-1])
        plain._text = plain.generator.encode_text(plain.encode("b"))
        plain._refresh_cache = lambda: None
        assert torch.equal(plain.step_latents(), kept)
    assert (latents(make(**changes), "a" * blocks + "b")[:, first:] - kept).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"use_infinite_attention": True}, {"local_attn_size": -1}])
@pytest.mark.parametrize("blocks", [2, 4, 6])
def test_switch_that_resets_the_sink_is_one_without_a_global_sink(make, changes, blocks):
    prompts = "a" * blocks + "bb"
    reset = latents(make(**changes), prompts, "reset")
    assert torch.equal(reset, latents(make(global_sink=False, **changes), prompts))
    same = torch.equal(reset, latents(make(**changes), prompts))
    assert same == (blocks <= 4 or "local_attn_size" in changes)  # until latents have left the window


def test_refresh_of_the_last_prompt_set_counts(make, forwards):
    session = make()
    latents(session, "aa")
    session.set_prompt("b", "keep")
    session.set_prompt("c")
    del forwards[:]
    session.step_latents()
    assert forwards[0] == (0, 6, 0)


def test_present_prompt_with_another_refresh_changes_nothing(make):
    assert torch.equal(latents(make(), "aaaaaa", "reset"), latents(make(), "aaaaaa"))


def test_unknown_refresh(make):
    with pytest.raises(ValueError, match=r"refresh='drop' must be one of recache, keep, reset"):
        make().set_prompt("a", "drop")


def test_settings_of_one_video_in_place_of_the_engines(engine, make):
    own = dataclasses.replace(engine.config, model_kwargs=ModelKwargs(sink_size=6), seed=4)
    assert torch.equal(latents(engine.session(config=own), "aaaaaa"), latents(make(seed=4, sink_size=6), "aaaaaa"))


def test_forgotten_prompts_are_encoded_again(engine):
    before = {prompt: engine.encode(prompt).clone() for prompt in "xyz"}
    engine.forget_prompts(keep=1)
    assert list(engine._embeds) == ["z"]
    assert all(torch.equal(engine.encode(prompt), embeds) for prompt, embeds in before.items())


def test_relative_positions_change_nothing_until_the_window_is_full(make):
    absolute, relative = latents(make(), "aaaaaa"), latents(make(use_infinite_attention=True), "aaaaaa")
    assert torch.equal(absolute[:, :12], relative[:, :12])
    assert (absolute[:, 12:] - relative[:, 12:]).abs().max() > 1e-4


def test_same_seed_same_video_and_another_seed_or_sample_another(make, engine):
    first = latents(make(seed=5), "aab")
    for same in (make(seed=5), engine.session(seed=5)):
        assert torch.equal(latents(same, "aab"), first)
    assert torch.equal(latents(engine.session(), "aab"), latents(make(seed=engine.config.seed), "aab"))
    for other in (make(seed=6), make(seed=5, sample=1)):
        assert (latents(other, "aab") - first).abs().max() > 0.1


def test_interleaved_sessions_do_not_disturb_each_other(make):
    plans = [({"seed": 0}, "aaabb"), ({"seed": 1, "use_infinite_attention": True}, "bbbba"),
             ({"seed": 2, "local_attn_size": -1}, "ccccc")]

    def finish(session: Session, prompts: str) -> Tensor:
        frames = []
        for prompt in prompts:
            session.set_prompt(prompt)
            frames.append(session.step())
        return torch.cat(frames)

    alone = [finish(make(**changes), prompts) for changes, prompts in plans]
    sessions = [make(**changes) for changes, _ in plans]
    frames = [[] for _ in plans]
    for block in range(5):
        for i, (_, prompts) in enumerate(plans):
            sessions[i].set_prompt(prompts[block])
        for i, session in enumerate(sessions):
            frames[i].append(session.step())
    for together, expected in zip(frames, alone, strict=True):
        assert torch.equal(torch.cat(together), expected)


@pytest.fixture(scope="module")
def recorded_errors() -> dict[str, float]:
    with torch.inference_mode():
        return dict(parity.run(GOLDEN))


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.safetensors")))
def test_recorded_case(recorded_errors, name):
    errors = {case: error for case, error in recorded_errors.items() if case.split(".")[0] == name}
    assert errors and max(errors.values()) <= 1e-4, errors


@pytest.fixture
def parity_command(tmp_path, monkeypatch, capsys):
    """Runs `python -m tests.parity` on a folder of some recorded cases: → (exit code, what it prints)."""

    def run(*names: str, spoil: Callable[[dict[str, Tensor]], None] = lambda case: None) -> tuple[int, str]:
        for path in GOLDEN.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, tmp_path)
        for name in names:
            file = GOLDEN / f"{name}.safetensors"
            case, (_, about) = load_file(file), parity.tensors(file)
            spoil(case)
            save_file(case, tmp_path / file.name, {"case": json.dumps(about)} if about else None)
        monkeypatch.setattr(sys, "argv", ["tests.parity", str(tmp_path)])
        monkeypatch.delitem(sys.modules, "tests.parity")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("tests.parity", run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    return run


def test_parity_command_prints_a_line_per_case_and_exits_0(parity_command):
    code, out = parity_command("t5", "switch_when_just_full")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["switch_when_just_full", "t5"]
    assert all(float(line[1]) <= 1e-4 and line[2] == "ok" for line in lines)


@pytest.mark.parametrize(("name", "key"), [("t5", "prompt_embeds"), ("switch_when_just_full", "latents"),
                                           ("taehv", "video")])
@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_parity_command_exits_1_where_one_number_is_wrong(parity_command, name, key, wrong):
    def spoil(case: dict[str, Tensor]) -> None:
        case[key].view(-1)[-1] += wrong

    code, out = parity_command(name, spoil=spoil)
    assert code == 1 and "FAIL" in out


def test_parity_command_exits_1_where_shapes_differ(parity_command):
    def spoil(case: dict[str, Tensor]) -> None:
        case["prompt_embeds"] = case["prompt_embeds"][:, :-1].contiguous()

    code, out = parity_command("t5", spoil=spoil)
    assert code == 1 and "FAIL" in out


def test_parity_command_exits_1_on_an_empty_folder(parity_command):
    code, out = parity_command()
    assert code == 1 and "no cases found" in out
