"""What the training computes is what the generator computes when it makes a video."""

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from demo import train
from demo.judge import ATTRIBUTES
from demo.training import forcing, generator, rollout, witness
from demo.training import vae as vaes
from demo.training.causal import Parallel, Plan
from demo.training.export import export, restore
from demo.training.looks import look
from demo.training.ranks import Ranks
from demo.training.reading import read
from demo.training.teacher import Matching
from demo.world import CATEGORIES, CHOICES
from pipeline.engine import Engine
from pipeline.noise import NoiseSource
from pipeline.session import Session
from utils.config import load_config
from utils.errors import UserError
from wan.kv_cache import KVCache
from wan.model import CausalWan, WanConfig
from wan.rope import RotaryEmbedding
from wan.sizes import from_sizes
from wan.umt5 import UMT5Config, UMT5Encoder

TINY = WanConfig(dim=32, ffn_dim=64, freq_dim=16, text_dim=24, num_heads=2, num_layers=2, text_len=8)
ROWS, COLUMNS, FRAMES = 2, 3, 3


def random_model() -> CausalWan:
    torch.manual_seed(0)
    model = CausalWan(TINY)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model


@torch.no_grad()
def one_after_another(model, clean, noisy, t_past, t, embeds, rope, window, sink):
    """Flow of noisy blocks, each over the cache that the clean blocks before it left; as `Session` does it."""
    cache = KVCache(layers=TINY.num_layers, batch=len(clean), tokens=ROWS * COLUMNS, heads=TINY.num_heads,
                    head_dim=TINY.head_dim, window=window, sink=sink, dtype=torch.float32, device="cpu")
    text = model.encode_text(embeds)
    flows = []
    for block in range(noisy.shape[1]):
        cache.begin(FRAMES * block, FRAMES)
        flows.append(model(noisy[:, block], float(t[block]), FRAMES * block, rope, cache, text))
        if block < clean.shape[1]:
            model(clean[:, block], t_past, FRAMES * block, rope, cache, text)
    return torch.stack(flows, 1)


def test_all_blocks_at_once_equal_one_after_another():
    model, rope = random_model(), RotaryEmbedding(TINY.head_dim, ROWS, COLUMNS, "cpu")
    blocks, batch = 6, 2
    shape = (batch, blocks, FRAMES, 16, 2 * ROWS, 2 * COLUMNS)
    clean, noisy = torch.randn(shape)[:, :-1], torch.randn(shape)
    embeds, t = torch.randn(batch, 5, TINY.text_dim), torch.linspace(1000, 300, blocks)
    plan = Plan(blocks, 1, window=4, sink=1, rope=rope, frames=FRAMES)
    every_t = torch.cat([torch.full((blocks - 1,), 40.0), t]).expand(batch, -1)
    with torch.no_grad():
        got = Parallel(model, plan)(torch.cat([clean, noisy], 1), every_t, embeds)
    expected = one_after_another(model, clean, noisy, 40.0, t, embeds, rope, window=12, sink=3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_every_draw_of_a_block_is_on_its_own():
    model, rope = random_model(), RotaryEmbedding(TINY.head_dim, ROWS, COLUMNS, "cpu")
    clean, noisy = torch.randn(1, 3, FRAMES, 16, 4, 6), torch.randn(1, 8, FRAMES, 16, 4, 6)
    embeds, t = torch.randn(1, 5, TINY.text_dim), torch.full((1, 11), 500.0)
    with torch.no_grad():
        both = Parallel(model, Plan(4, 2, window=4, sink=1, rope=rope, frames=FRAMES))(
            torch.cat([clean, noisy], 1), t, embeds)
        second = Parallel(model, Plan(4, 1, window=4, sink=1, rope=rope, frames=FRAMES))(
            torch.cat([clean, noisy[:, 4:]], 1), t[:, :7], embeds)
    torch.testing.assert_close(both[:, 4:], second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
                                   {**vaes.SIZES, "base_dim": 4}])
@torch.no_grad()
def test_vae_in_two_pieces_equals_diffusers(sizes):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**sizes)
    video = torch.randn(1, 3, 13, 16, 24)
    expected = vae.encode(video).latent_dist.mean
    mean, _ = vaes.encode(vae, video)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    latents = torch.randn_like(mean)
    torch.testing.assert_close(vaes.decode(vae, latents).clamp(-1, 1), vae.decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_a_block_that_lets_gradients_through_is_the_block_of_the_cache():
    model, rope = random_model(), RotaryEmbedding(TINY.head_dim, ROWS, COLUMNS, "cpu")
    text = model.encode_text(torch.randn(1, 5, TINY.text_dim))
    caches = [KVCache(layers=TINY.num_layers, batch=1, tokens=ROWS * COLUMNS, heads=TINY.num_heads,
                      head_dim=TINY.head_dim, window=12, sink=3, dtype=torch.float32, device="cpu") for _ in range(2)]
    for block in range(6):  # the window is full after four
        latents, position = torch.randn(1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS), FRAMES * block
        for cache in caches:
            cache.begin(position, FRAMES)
        with torch.no_grad():
            expected = model(latents, 0.0, position, rope, caches[0], text)
        got = model(latents, 0.0, position, rope, rollout.Tape(caches[1]), text)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].self_attn.parameters())


def test_videos_in_training_are_made_as_a_session_makes_them(tiny_training, monkeypatch):
    torch.manual_seed(0)
    fast = CausalWan(generator.GENERATOR)
    for value in fast.parameters():
        torch.nn.init.normal_(value, std=0.1)
    embeds = {prompt: torch.randn(1, 4, fast.config.text_dim) for prompt in "ab"}
    noise = NoiseSource(0, (FRAMES, 16, 14, 24))
    config = load_config("configs/demo.yaml", ["device=cpu"])
    session = Session(config, fast, embeds.get, None, noise)
    videos = rollout.Videos(fast, embeds["a"])
    sigmas = [t / 1000 for t in session.steps]
    assert sigmas == rollout.SIGMAS
    with torch.no_grad():
        for block in range(8):  # evictions from the fifth on, switches before and after
            prompt = "a" if block in (0, 1, 6, 7) else "b"
            session.set_prompt(prompt)
            if block in (2, 6):
                videos.switch(embeds[prompt])
            draws = iter([noise.start(block), *(noise.renoise(block, i) for i in range(len(sigmas) - 1))])
            monkeypatch.setattr(torch, "randn_like", lambda like, draws=draws: next(draws))
            videos.begin()
            x0 = videos.denoise()
            videos.remember(x0)
            videos.finish(x0)
            torch.testing.assert_close(x0, session.step_latents().clone(), rtol=1e-4, atol=1e-4)


class LeadsTo:
    """A flow that leads from anywhere to one place."""

    def __init__(self, place: float):
        self.place = place

    def see(self, past, embeds) -> None:
        pass

    def flow(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - self.place) / sigma[:, None, None, None, None]

    def learn(self, x0, embeds) -> torch.Tensor:
        return x0.new_zeros(())


@pytest.mark.parametrize("student,teacher,towards", [(0.0, 1.0, 1), (0.5, -1.0, -1), (0.25, 0.25, 0)])
def test_matching_moves_the_student_to_where_the_teacher_is(student, teacher, towards):
    videos = SimpleNamespace(past=lambda: None, embeds=None)
    x0 = torch.full((2, FRAMES, 16, 2, 2), 0.1, requires_grad=True)
    losses = Matching(LeadsTo(teacher), LeadsTo(student))(videos, x0, 1.0, x0)
    losses["loss"].backward()
    assert torch.equal((-x0.grad).where(x0.grad.abs() > 1e-6, 0.0).sign(), torch.full_like(x0, towards))


def sees(choices: list[int], sure: float = 20.0) -> list[torch.Tensor]:
    """What a witness says that is sure of these choices."""
    return [sure * F.one_hot(torch.tensor([choice]), len(CHOICES[name])).float()
            for name, choice in zip(CATEGORIES, choices, strict=True)]


@pytest.mark.parametrize("scene,wrong", [([1, 2, 3, 4, 1, 1], set()), ([1, 2, 5, 4, 1, 0], {"motion", "camera"})])
def test_a_witness_is_asked_what_lasts(scene, wrong, monkeypatch):
    one = witness.Witness(width=8)
    monkeypatch.setattr(one, "forward", lambda latents: sees([1, 2, 3, 4, 1, 1]))
    latents, scenes = torch.randn(1, 9, 16, 14, 24), torch.tensor([scene]).expand(3, 1, 6)
    losses = one.loss(latents, scenes)
    assert {name for name, loss in losses.items() if loss > 1} == wrong
    before = scenes.clone()
    before[0] += 1  # all of it changed in the second block
    assert not any(one.loss(latents, before).values())


def test_a_witness_is_told_how_far_the_camera_moves(monkeypatch):
    one, pan = witness.Witness(width=8), [0, 0, 0, 0, 0, 1]
    scenes = torch.tensor([pan]).expand(3, 1, 6)
    latents = torch.randn(1, 9, 16, 14, 24)
    best = {}
    for moved in (1.0, 0.5, 0.0):
        losses = []
        for share in torch.linspace(0.02, 0.98, 49):  # of the pan, in what it sees
            said = sees(pan)
            said[-1] = torch.stack([1 - share, share, share.new_tensor(1e-6)])[None].log()
            monkeypatch.setattr(one, "forward", lambda latents, said=said: said)
            losses.append(one.loss(latents, scenes, torch.tensor([moved]))["camera"])
        best[moved] = 0.02 * (1 + torch.stack(losses).argmin().item())
    assert best == pytest.approx({1.0: 0.98, 0.5: 0.5, 0.0: 0.02})


def test_a_witness_sees_the_latest_blocks_and_is_told_their_scenes(tmp_path, monkeypatch):
    torch.save(witness.Witness().state_dict(), tmp_path / witness.FILE)
    loss = witness.Witnessed(lambda *args: {}, tmp_path, 1.0, 2, "cpu")
    seen = []
    monkeypatch.setattr(loss.witness, "loss", lambda *told: seen.append(told) or {"all": torch.zeros(())})
    for scene in range(4):
        loss.tell(torch.full((2, 6), scene))
    past = torch.arange(3.0).view(3, 1, 1, 1, 1, 1).expand(3, 2, 3, 16, 14, 24)  # of which the first is the sink
    loss(SimpleNamespace(past=lambda: past), None, 1.0, torch.full((2, 3, 16, 14, 24), 3.0))
    (latents, scenes), = seen
    assert latents[:, :, 0, 0, 0].tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3]] * 2
    assert scenes[..., 0].tolist() == [[1, 1], [2, 2], [3, 3]]


def test_clips_of_a_witness_change_their_scene_at_the_switch():
    store = object.__new__(witness.Store)
    store.latents = torch.arange(21.0).div(3, rounding_mode="floor").view(1, 21, 1, 1, 1).expand(2, 21, 16, 14, 24)
    store.scenes = torch.tensor([[[1] * 6, [2] * 6]] * 2)
    store.switch, store.moved = torch.tensor([4, 0]), torch.tensor([0.25, 1.0])
    latents, scenes, moved = store.batch(64)
    blocks = latents[:, ::3, 0, 0, 0].T  # [BLOCKS, B], the index of each
    assert (blocks.diff(dim=0) == 1).all() and set(blocks[0].tolist()) == {0, 1, 2, 3, 4}
    switches = moved == 0.25
    assert switches.any() and not switches.all()
    second = (blocks >= 4) & switches
    assert torch.equal(scenes, torch.where(second, 2, 1)[..., None].expand(-1, -1, 6))


def test_a_video_is_moved_to_where_a_witness_sees_its_scene(tmp_path):
    torch.manual_seed(0)
    torch.save(witness.Witness().state_dict(), tmp_path / witness.FILE)
    loss = witness.Witnessed(lambda *args: {"loss": args[-1].mean() * 0}, tmp_path, 1.0, 1, "cpu")
    past = torch.randn(3, 1, 3, 16, 14, 24)
    x0 = torch.randn(1, 3, 16, 14, 24, requires_grad=True)
    scene = torch.tensor([[1, 2, 3, 4, 1, 1]])
    for _ in range(witness.BLOCKS):
        loss.tell(scene)

    def witnessed(x0, blocks=3):
        torch.manual_seed(1)
        return loss(SimpleNamespace(past=lambda: past[:blocks]), x0, 1.0, x0)

    assert "witness" not in witnessed(x0, 1)  # too few blocks to see anything
    first = witnessed(x0)["witness"]
    first.backward()
    assert witnessed(x0.detach() - 0.5 * x0.grad / x0.grad.norm())["witness"] < first - 0.01


@torch.no_grad()
def test_captions_are_read_in_training_as_prompts_are():
    torch.manual_seed(0)
    _, text = generator.new_models("cpu")
    ids = torch.tensor([[5, 9, 7, 1, 0, 0], [8, 1, 0, 0, 0, 0]])
    reader = UMT5Encoder(from_sizes(UMT5Config, text.config.to_dict()))
    reader.load_state_dict(text.state_dict())
    for embeds, prompt in zip(read(text, ids), ids, strict=True):
        count = int((prompt > 0).sum())
        torch.testing.assert_close(embeds[:count], reader(prompt[None, :count])[0])
        assert not embeds[count:].any()


@pytest.fixture
def tiny_training(monkeypatch):
    """Every stage at a size that takes seconds on a CPU."""
    config = dataclasses.replace(generator.GENERATOR, dim=32, ffn_dim=32, num_heads=1, num_layers=1)
    monkeypatch.setattr(vaes, "SIZES", {**vaes.SIZES, "base_dim": 4})
    for module in (generator, rollout):
        monkeypatch.setattr(module, "GENERATOR", config)
    monkeypatch.setattr(generator, "PHASES", {
        stage: tuple(dataclasses.replace(phase, share=1 / 2, batch=2, blocks=blocks)
                     for phase, blocks in zip(phases, (1, 3), strict=True))
        for stage, phases in generator.PHASES.items()})
    monkeypatch.setattr(generator, "FIRST_BLOCKS", 1)
    monkeypatch.setattr(forcing, "STAGES", {
        stage: dataclasses.replace(how, blocks=5, switch_every=((2, 2), (3, 3)) if how.switch_every else (),
                                   critic_first=min(2, how.critic_first))
        for stage, how in forcing.STAGES.items()})


def test_every_stage_runs_goes_on_and_makes_a_checkpoint_that_loads(tiny_training, tmp_path, capsys, monkeypatch):
    ranks, stages = Ranks(), tmp_path / "stages"
    stages.mkdir()
    vaes.train(stages, steps=3, device="cpu", clips=1, crop=(1, 3, 5, 32, 32), whole=(1, 3, 5, 64, 64), measured=1)
    for steps in (1, 3):
        generator.train(stages, ranks, "generator", steps=steps, device="cpu", clips=2)
    assert "generator: goes on at step 1 of 3" in capsys.readouterr().out
    generator.train(stages, ranks, "refined", steps=2, device="cpu", clips=2)
    with pytest.raises(UserError, match=r"witness\.pt: no such file; train the witness first"):
        forcing.train(stages, ranks, "streaming", steps=1, device="cpu", batch=1)
    for steps in (1, 2):
        witness.train(stages, steps=steps, device="cpu", clips=2, batch=2)
    assert "witness: goes on at step 1 of 2" in capsys.readouterr().out
    told, tell = [], witness.Witnessed.tell
    monkeypatch.setattr(witness.Witnessed, "tell", lambda one, scenes: told.append(scenes) or tell(one, scenes))
    for stage, steps in (("distilled", 5), ("matched", 5), ("streaming", 7)):
        forcing.train(stages, ranks, stage, steps=steps, device="cpu", batch=1)
    assert {file.name for file in (stages / "curves").iterdir()} == {
        f"{stage}.json" for stage in ("vae", "reading", "generator", "refined", "distilled", "matched", "witness",
                                          "streaming")}
    changed = [bool((one != two).any()) for one, two in itertools.pairwise(told)]
    assert changed == [False, True, False, True, True, False]  # at every second block, and when new videos begin

    for stage in ("generator", "refined", "distilled", "matched", "streaming"):
        shares = look(stages, stage, "cpu", videos=2)
        assert set(shares) == set(ATTRIBUTES)
        assert (stages / f"looks/{stage}.png").stat().st_size > 0

    export(stages, tmp_path / "checkpoint")
    config = load_config("configs/demo.yaml", [
        f"wan_folder={tmp_path}", f"generator_ckpt={tmp_path}/checkpoint/models/longlive_base.pt",
        f"lora_ckpt={tmp_path}/checkpoint/models/lora.pt", f"adapter.rank={forcing.RANK}",
        f"adapter.alpha={forcing.RANK}", "cache_merged=false", "device=cpu"])
    session = Engine.from_config(config).session(seed=0)
    session.set_prompt("a red ball")
    assert session.step().shape == (9, 112, 192, 3)

    again = tmp_path / "again"
    again.mkdir()
    restore(tmp_path / "checkpoint", again)
    first, second = (generator.load(folder, "cpu", "matched.pt")[0].state_dict() for folder in (stages, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    teacher, restored = (generator.load(folder, "cpu", "refined.pt")[0].state_dict() for folder in (stages, again))
    for name, value in teacher.items():
        assert (restored[name] - value).abs().max() <= 0.005 * (first[name] - value).abs().max() + 1e-6

    shutil.copy(stages / witness.FILE, again)
    other = tmp_path / "other"  # whose generator is not the checkpoint's
    other.mkdir()
    shutil.copy(stages / "distilled.pt", other / "matched.pt")
    restore(tmp_path / "checkpoint", other)
    assert (other / "vae.pt").exists() and not (other / forcing.LORA_BEFORE).exists()

    forcing.train(again, ranks, "streaming", steps=1, device="cpu", batch=1)  # in which only the critic learns
    before, after = (torch.load(folder / "streaming.pt", weights_only=True)["lora"] for folder in (stages, again))
    for name, parts in before.items():
        assert parts["B"].abs().max() > 0
        torch.testing.assert_close(after[name], {part: value.half().float() for part, value in parts.items()})


def test_a_start_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "stages"), "--start", "nothere"])
    with pytest.raises(UserError, match=r"--start=nothere/vae/config\.json: no such file"):
        train.main()
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize("stages,with_lora", [("streaming", True), ("witness streaming", True), ("matched", False),
                                              ("matched witness streaming", False)])
def test_a_lora_is_gone_on_with_where_its_generator_stays(stages, with_lora, tmp_path, monkeypatch):
    restored = []
    monkeypatch.setattr(train, "restore", lambda start, folder, with_lora: restored.append(with_lora))
    for name in ("run", "look"):
        monkeypatch.setattr(train, name, lambda *_: None)
    (tmp_path / witness.FILE).touch()
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path), "--start", "demo/checkpoint", "--stages", *stages.split()])
    train.main()
    assert restored == [with_lora]


@pytest.mark.parametrize("stages", ["streaming", "matched streaming", "streaming witness"])
def test_a_witness_that_is_missing_is_told_before_anything_is_trained(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run", None)
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "stages"), "--stages", *stages.split()])
    with pytest.raises(UserError, match=r"witness\.pt: no such file; train the witness first"):
        train.main()
    assert not (tmp_path / "stages").exists()
