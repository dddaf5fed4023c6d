"""The toy world and its captions: what is drawn is what the scene says, and changes without a cut."""

import random

import pytest
import torch

from demo import captions
from demo.canvas import HEIGHT, WIDTH
from demo.world import (
    BLEND,
    CATEGORIES,
    CHOICES,
    FPS,
    Manner,
    Scene,
    Script,
    draw,
    frames_of,
    is_held_out,
    paint,
    sample,
    scene_of,
    scenery_speed,
)

SCENE = Scene("ball", "red", "still", "meadow", "noon", "still")


def clip(*scenes: Scene, starts: list[float] | None = None, seed: int = 0) -> Script:
    return Script.of([list(scenes)], [starts or [2.0 * k for k in range(len(scenes))]], seed)


def changed(scene: Scene, **values: str) -> Scene:
    return Scene(**{name: values.get(name, getattr(scene, name)) for name in CATEGORIES})


def test_draws_frames_of_the_stated_size():
    assert draw(clip(SCENE), 3).shape == (1, 3, 3, HEIGHT, WIDTH)


def test_draws_the_same_again_in_any_batch():
    scenes = [[scene_of(s)] for s in sample(3, 1, torch.Generator().manual_seed(0))[:, 0].tolist()]
    script = Script.of(scenes, [[0.0]] * 3, seed=1)
    whole = draw(script, 4)
    for other in (draw(script, 4, batch=5), torch.cat([draw(script[i:i + 1], 4) for i in range(3)])):
        off = (whole.int() - other.int()).abs()
        assert off.max() <= 1 and off.count_nonzero() < off.numel() / 1000  # what lies between two steps


@pytest.mark.parametrize("name", CATEGORIES)
def test_every_attribute_shows(name):
    """Each choice of an attribute gives pictures of its own."""
    scenes = [changed(SCENE, **{name: value}) for value in CHOICES[name]]
    script = Script.of([[scene] for scene in scenes], [[0.0]] * len(scenes))
    script.style[:] = script.style[:1]
    every = frames_of(script, 33)
    frames = 255 * paint(every[torch.arange(len(every)) % 33 % 16 == 0]).unflatten(0, (len(scenes), 3))
    for i in range(len(scenes)):
        for j in range(i):
            assert (frames[i] - frames[j]).abs().mean() > 0.1, (scenes[i], scenes[j])


@pytest.mark.parametrize("copies", [0, 2])
def test_copies_are_drawn(copies):
    one = clip(SCENE)
    other = Script(one.scenes, one.starts, one.style, torch.tensor([copies]))
    assert (draw(one, 1).float() - draw(other, 1).float()).abs().mean() > 1


@pytest.mark.parametrize("name", CATEGORIES)
def test_a_switch_is_no_cut(name):
    """Each attribute blends over its time; nothing jumps, and then the new choice alone is to be seen."""
    after = CHOICES[name][3 % len(CHOICES[name])]
    before = CHOICES[name][1]
    frames = frames_of(clip(changed(SCENE, **{name: before}), changed(SCENE, **{name: after}), starts=[0.0, 1.0]), 64)
    shown = frames.shown[name]
    torch.testing.assert_close(shown.sum(1), torch.ones(64))
    assert shown[:FPS + 1, CHOICES[name].index(before)].min() == 1
    end = FPS + int(BLEND[name] * FPS) + 1
    torch.testing.assert_close(shown[end:, CHOICES[name].index(after)], torch.ones(64 - end))
    assert 0 < shown[FPS + 3, CHOICES[name].index(after)] < 1
    for value, most in ((frames.x, 12), (frames.y, 12), (frames.travel, 4), (frames.zoom, 0.1), (frames.size, 1e-4)):
        assert value.diff().abs().max() <= most


def test_position_stays_through_a_switch_of_appearance():
    before, after = changed(SCENE, motion="circle"), Scene("car", "blue", "circle", "city", "night", "still")
    alone, switched = frames_of(clip(before), 48), frames_of(clip(before, after, starts=[0.0, 1.0]), 48)
    torch.testing.assert_close(switched.x, alone.x)
    torch.testing.assert_close(switched.y, alone.y)


def test_frame_to_frame_change_at_a_switch_is_small():
    pictures = draw(clip(SCENE, changed(SCENE, colour="blue", light="sunset"), starts=[0.0, 1.0]), 40).float()
    change = (pictures[0, 1:] - pictures[0, :-1]).abs().mean((1, 2, 3))
    whole = (pictures[0, -1] - pictures[0, 0]).abs().mean()
    assert whole > 10 and change.max() < 0.35 * whole


@pytest.mark.parametrize("motion,camera,least,most", [
    ("still", "still", 0, 0), ("bounce", "still", 0, 0), ("drift left", "still", 1, 1), ("drift right", "still", 1, 1),
    ("still", "pan", 0.5, 1), ("still", "zoom", 0.1, 0.9),
])
def test_speed_of_the_scenery(motion, camera, least, most):
    speed = scenery_speed(clip(changed(SCENE, motion=motion, camera=camera)), 81)  # a period of the camera
    assert speed.shape == (1, 81) and least <= speed.max() <= most and least * 0.99 <= speed.max()
    assert least < 1 or speed.min() > 0.99


def manner(**values: float) -> Manner:
    exact = Manner.exact(1, "cpu")
    return Manner(**{name: torch.tensor([values.get(name, getattr(exact, name).item())]) for name in vars(exact)})


def test_manners():
    def frames(motion: str, moves: str, **values: float):
        return frames_of(clip(changed(SCENE, motion=motion, camera=moves)), 40, manner(**values))

    exact = frames("drift right", "pan")
    for name, value in vars(frames_of(clip(changed(SCENE, motion="drift right", camera="pan")), 40)).items():
        assert not torch.is_tensor(value) or torch.equal(value, getattr(exact, name))
    assert frames("drift right", "still").y.std() > 1 > 1e-3 > frames("drift right", "still", bob=0.0).y.std()
    assert frames("still", "still").y.std() < 1e-3 and frames("still", "still", wobble=2.0).y.std() > 1
    assert frames("still", "still").x.std() < 1e-3 and frames("still", "still", stray=10.0).x.std() > 1
    fast, slow = (frames("drift right", "still", tempo=tempo).travel.diff().mean() for tempo in (1.2, 0.8))
    torch.testing.assert_close(fast / slow, torch.tensor(1.5))
    wide, narrow = (frames("still", "zoom", camera=factor).zoom.max() - 1 for factor in (1.0, 0.5))
    torch.testing.assert_close(wide / narrow, torch.tensor(2.0))


def test_finer_scenery_is_narrower_and_passes_as_fast():
    def dashes(fine: float):  # on a street, of 48 pixels each
        script = clip(changed(SCENE, motion="drift right", setting="city", light="noon"))
        return draw(script, 33, manner=manner(fine=fine))[0, :, 2, 101] > 120

    def edges(row: torch.Tensor) -> int:
        return (row[1:] & ~row[:-1]).sum()

    usual, finer = dashes(1.0), dashes(2.0)
    assert edges(finer[0]) in (2 * edges(usual[0]) - 1, 2 * edges(usual[0]), 2 * edges(usual[0]) + 1)
    for rows in (usual, finer):
        assert (rows[0, 60:] == rows[32, :-60]).float().mean() > 0.9  # 30 pixels a second


def test_held_out_combinations_are_never_sampled_for_training():
    generator = torch.Generator().manual_seed(0)
    assert not is_held_out(sample(500, 4, generator)).any()
    assert is_held_out(sample(200, 2, generator, held_out=True)).all()


def test_at_least_a_tenth_is_held_out():
    sizes = [len(CHOICES[name]) for name in CATEGORIES]
    grid = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    held = is_held_out(grid)
    assert 0.1 <= held.float().mean() < 0.2
    for i in range(len(sizes)):  # each choice by itself is trained on, and held out in some combination
        assert set(grid[held][:, i].tolist()) == set(grid[~held][:, i].tolist()) == set(range(sizes[i]))


def test_consecutive_scenes_differ_in_one_to_three_attributes():
    scenes = sample(300, 5, torch.Generator().manual_seed(0))
    differ = (scenes[:, 1:] != scenes[:, :-1]).sum(-1)
    assert differ.min() == 1 and differ.max() == 3


def test_scenes_repeat_with_the_seed():
    first, again = (sample(20, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", CATEGORIES)
def test_captions_tell_every_attribute(name):
    """Each choice has words, no two choices the same; a caption names its own and no other."""
    table = {"subject": captions.SUBJECTS, "colour": captions.COLOURS, "setting": captions.SETTINGS,
             "light": captions.LIGHTS, "camera": captions.CAMERAS,
             "motion": {k: a + b for k, (a, b) in captions.MOTIONS.items()}}[name]
    assert set(table) == set(CHOICES[name])
    words = [word.lower() for many in table.values() for word in set(many)]
    assert len(words) == len(set(words))
    rng = random.Random(0)
    for value in CHOICES[name]:
        for _ in range(30):
            text = captions.caption(changed(SCENE, **{name: value}), rng).lower()
            said = any(word.lower() in text for word in table[value])
            assert said or captions.UNSAID.get(name) == value, text


def test_captions_are_sentences_and_repeat_with_the_seed():
    scenes = [scene_of(s) for s in sample(200, 1, torch.Generator().manual_seed(0))[:, 0].tolist()]
    texts = [captions.caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    assert texts == [captions.caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    for text in texts + [captions.plain(scene) for scene in scenes]:
        assert text[0].isupper() and text.endswith(".") and "  " not in text and " ." not in text, text
    assert len({captions.caption(SCENE, random.Random(i)) for i in range(100)}) > 50
