"""The judge: its interface, what it is trained on, and, where its weights are there, how often it is right."""

import json

import pytest
import torch

from demo import judge_training
from demo.canvas import HEIGHT, WIDTH
from demo.judge import (
    APPEARANCE,
    ATTRIBUTES,
    COUNT,
    OF_SUBJECT,
    SHORTEST,
    SIZES,
    STRIDE,
    VAE,
    WEIGHTS,
    WINDOW,
    Judge,
    Network,
    main,
)
from demo.judge_training import (
    MARGIN,
    Decoder,
    accuracy,
    disturb,
    draw_seen,
    labels,
    loss_of,
    random_script,
    worsen,
)
from demo.videos import read_video
from demo.world import CATEGORIES, FPS, Manner, draw, is_held_out
from utils.errors import UserError
from utils.video import Mp4Writer


def clips(count: int, frames: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=random)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    network = Network()
    for head in network.heads.values():
        torch.nn.init.normal_(head.weight)
    return Judge(network)


def test_reads_every_attribute_of_a_window(judge):
    probabilities = judge.probabilities(clips(2, WINDOW))
    assert {name: tuple(value.shape) for name, value in probabilities.items()} == {
        name: (2, size) for name, size in SIZES.items()}
    for value in probabilities.values():
        torch.testing.assert_close(value.sum(-1), torch.ones(2))
    read = judge(clips(2, WINDOW))
    assert list(read) == list(ATTRIBUTES)
    for name, value in read.items():
        assert torch.equal(value, probabilities[name].argmax(-1))


@pytest.mark.parametrize("frames", [SHORTEST, WINDOW - 1])
def test_reads_only_appearance_of_less(judge, frames):
    assert set(judge(clips(1, frames))) == set(APPEARANCE)


def test_looks_at_the_last_frames(judge):
    video = clips(1, WINDOW + 10)
    for name, value in judge.probabilities(video).items():
        torch.testing.assert_close(value, judge.probabilities(video[:, -WINDOW:])[name], msg=name)


def test_does_not_depend_on_the_batch(judge):
    video = clips(3, WINDOW)
    alone = [judge.probabilities(video[i:i + 1]) for i in range(3)]
    for name, value in judge.probabilities(video).items():
        torch.testing.assert_close(value, torch.cat([part[name] for part in alone]), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("frames", [clips(1, SHORTEST - 1), clips(1, WINDOW).float(), clips(1, WINDOW)[..., :64, :],
                                    clips(1, WINDOW)[0]])
def test_refuses_other_shapes(judge, frames):
    with pytest.raises(ValueError, match="needs"):
        judge.probabilities(frames)


def test_weights_survive_the_file(judge, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size < 4e6
    again = Judge.load(tmp_path / "judge.safetensors")
    video = clips(1, WINDOW)
    for name, value in judge.probabilities(video).items():
        torch.testing.assert_close(again.probabilities(video)[name], value, rtol=0, atol=0.01)


def test_training_clips_have_every_count_and_all_combinations():
    script = random_script(400, torch.Generator().manual_seed(0))
    shares = script.copies.bincount(minlength=3) / len(script)
    assert 0.08 < shares[0] < 0.16 and 0.08 < shares[2] < 0.16
    assert 0.1 < is_held_out(script.scenes[:, 0]).float().mean() < 0.2


def test_training_sees_the_frames_of_the_world():
    script = random_script(2, torch.Generator().manual_seed(0))
    seen = (255 * draw_seen(script, 8)).round().to(torch.uint8)
    off = (seen.int() - draw(script, 8)[:, ::2].int()).abs()
    assert off.max() <= 1 and off.count_nonzero() < off.numel() / 1000  # what lies between two steps


def test_worse_clips_differ_from_clip_to_clip_and_repeat():
    pictures = draw_seen(random_script(1, torch.Generator().manual_seed(0)), 4).repeat(2, 1, 1, 1, 1)
    worse = worsen(pictures, torch.Generator().manual_seed(1))
    assert worse.shape == pictures.shape and worse.min() >= 0 and worse.max() <= 1
    assert torch.equal(worse, worsen(pictures, torch.Generator().manual_seed(1)))
    assert (worse[0] - worse[1]).abs().mean() > 0.01


def test_clips_without_a_subject_teach_nothing_of_it():
    script = random_script(4, torch.Generator().manual_seed(0))
    script.copies[:] = 0
    truth = labels(script)
    logits = {name: torch.randn(4, size, requires_grad=True) for name, size in SIZES.items()}
    loss_of(logits, truth).backward()
    assert {name for name, value in logits.items() if value.grad.abs().sum() == 0} == set(OF_SUBJECT)


def test_disturbs_each_clip_in_its_own_way_and_a_block_of_it_alike():
    generator = torch.Generator().manual_seed(0)
    disturbed = disturb(torch.zeros(64, 12, 16, 14, 24), generator)
    sizes = disturbed.std((1, 2, 3, 4))
    assert sizes.min() == 0 and 0.4 < sizes.max() < 0.6
    noise = disturbed.unflatten(1, (4, 3)).mean((-1, -2))  # coarse noise is what is left of all, clips by blocks
    within, between = noise.var(2).mean(), noise.mean(2).var(1).mean()
    assert between > 3 * within
    again = disturb(torch.zeros(64, 12, 16, 14, 24), torch.Generator().manual_seed(0))
    assert torch.equal(again, disturbed)


def test_disturbs_by_blurs_in_time_and_in_space(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: torch.zeros(*shape))
    one = torch.zeros(64, 12, 16, 14, 24)
    one[:, 5, :, 6, 12] = 1
    blurred = disturb(one, torch.Generator().manual_seed(0))
    torch.testing.assert_close(blurred.sum((1, 3, 4)), torch.ones(64, 16))
    for neighbour in (blurred[:, 4, :, 6, 12], blurred[:, 5, :, 6, 13]):
        spread = (neighbour > 0).any(1).float().mean()
        assert 0.3 < spread < 0.7  # of the clips
    assert not blurred[:, 7].any() and not blurred[..., 14].any()


def test_decodes_windows_that_look_like_drawn_ones(monkeypatch):
    script = random_script(2, torch.Generator().manual_seed(5), other_count=0)
    drawn = draw(script, MARGIN + WINDOW)[:, MARGIN:].float()
    decoder = Decoder(VAE, "cpu")
    disturbed = decoder(script, None, torch.Generator().manual_seed(0))
    monkeypatch.setattr(judge_training, "disturb", lambda latents, generator: latents)
    decoded = decoder(script, None, torch.Generator().manual_seed(0))
    assert decoded.shape == drawn.shape and decoded.dtype == torch.uint8
    error = (decoded.float() - drawn).square().mean((1, 2, 3, 4))
    assert (10 * torch.log10(255**2 / error) > 25).all()  # a frame earlier or later it is less
    assert ((disturbed.float() - drawn).square().mean((1, 2, 3, 4)) > error).all()


def test_trains_validates_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_training, "PART", 2)  # so two of three clips are decoded ones
    decoded, decode = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda one, script, *how: decoded.append(len(script)) or decode(
        one, script, *how))
    out = tmp_path / "judge.safetensors"
    common = ["train", "--out", str(out), "--steps", "2", "--batch", "2", "--test-clips", "2", "--clips", "3",
              "--device", "cpu", "--seconds-between-saves", "0"]
    main([*common, "--seconds-between-reports", "0"])
    whole = out.read_bytes()
    assert decoded == [2]
    assert "step 2 loss" in capsys.readouterr().out and not list(tmp_path.glob("*.pt"))

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_training.Store, "batch", _stops_at(1, judge_training.Store.batch, stop))
        with pytest.raises(Stopped):
            main(common)
    main(common)
    assert "step 1 of 2" in capsys.readouterr().out
    assert out.read_bytes() == whole

    main(["validate", "--weights", str(out), "--clips", "2", "--mp4-clips", "1", "--device", "cpu", "--out",
          str(tmp_path / "judge.json")])
    right = json.loads((tmp_path / "judge.json").read_text())["right"]
    assert set(right["drawn"]) == set(right["decoded"]) == set(right["MP4"]) == set(ATTRIBUTES)
    assert set(right["8 frames"]) == set(APPEARANCE)


@pytest.mark.parametrize("arguments", [("validate", "--weights"), ("validate", "--vae"),
                                       ("train", "--out", "a.safetensors", "--start"), ("train", "--vae")])
def test_weights_that_are_not_there_are_told(arguments):
    with pytest.raises(UserError, match=f"{arguments[-1]}=nothere(/config.json)?: no such file"):
        main([*arguments, "nothere"])


def _stops_at(step: int, batch, stop):
    return lambda store, size, seed: stop() if seed == step else batch(store, size, seed)


def test_reads_videos_back(tmp_path):
    frames = draw(random_script(1, torch.Generator().manual_seed(0)), 12)[0].permute(0, 2, 3, 1).contiguous()
    with Mp4Writer(tmp_path / "a.mp4", width=WIDTH, height=HEIGHT, fps=FPS) as writer:
        writer.write(frames)
    whole = read_video(tmp_path / "a.mp4")
    assert whole.shape == tuple(frames.shape) and abs(whole.astype(int) - frames.numpy()).mean() < 5
    assert (read_video(tmp_path / "a.mp4", 3, 4) == whole[3:7]).all()
    with pytest.raises(ValueError, match=r"b\.mp4"):
        read_video(tmp_path / "b.mp4")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the judge is not trained yet")
def test_is_right_on_drawn_clips():
    script = random_script(24, torch.Generator().manual_seed(7))
    network = Judge.load().network
    right = accuracy(network, (255 * draw_seen(script)).round().to(torch.uint8), labels(script), 8)
    assert min(right.values()) > 0.9, right
    assert right[COUNT] == 1


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the judge is not trained yet")
def test_is_right_on_decoded_clips():
    script = random_script(8, torch.Generator().manual_seed(8), other_count=0)
    decoded = Decoder(VAE, "cpu")(script, None, torch.Generator().manual_seed(1))
    right = accuracy(Judge.load().network, decoded[:, ::STRIDE], labels(script), 8)
    assert min(right.values()) > 0.9, right


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the judge is not trained yet")
@pytest.mark.parametrize("bob,wobble,fine", [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.5, 1.0), (0.0, 0.0, 1.8)])
def test_a_drift_is_told_by_the_scenery_that_passes(bob, wobble, fine):
    """And not by the bobbing that comes with it in the world, nor by how wide things are in it."""
    script = random_script(80, torch.Generator().manual_seed(3), other_count=0)
    script = script[script.scenes[:, 0, CATEGORIES.index("motion")] < 2]
    one = torch.ones(len(script))
    seen = draw_seen(script, manner=Manner(one, one, bob * one, wobble * one, 0 * one, fine * one))
    right = accuracy(Judge.load().network, (255 * seen).round().to(torch.uint8), labels(script), 8)
    assert len(script) > 12 and right["motion"] > 0.9, right
