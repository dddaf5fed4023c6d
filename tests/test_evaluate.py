"""The evaluation: films made together are those made alone, and the numbers are right where the truth is known."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from demo import evaluate
from demo.canvas import HEIGHT, WIDTH
from demo.evaluation import plan, report
from demo.evaluation.batch import CLEAR, KEEP, BatchSession, BatchStream, StackedNoise
from demo.evaluation.films import Reels, drawn, generated
from demo.evaluation.measure import changes, measure, statistics
from demo.evaluation.plan import MAIN, PROMPT, TIMELINE, Film
from demo.judge import ATTRIBUTES, COUNT, Judge, Network
from demo.videos import read_video
from demo.world import CATEGORIES, CHOICES, FPS, Scene, is_held_out
from pipeline.engine import Engine
from pipeline.noise import NoiseSource
from tests.conftest import assert_complains

FIRST, SECOND = ("a red ball", "a longer prompt about a blue car"), ("a green ball", "night")


@pytest.fixture
def engine(tiny_config) -> Engine:
    return Engine.from_config(tiny_config)


def pixels(session, prompts, alone: int | None = None) -> list[torch.Tensor]:
    """Frames of each step of a session whose prompts are given block by block."""
    frames = []
    for of_block in prompts:
        session.set_prompts(of_block) if alone is None else session.set_prompt(of_block[alone])
        frames.append(session.step().int())
    return frames


@pytest.mark.parametrize("relative", [False, True])
def test_films_made_together_are_those_made_alone(engine, relative):
    kwargs = dataclasses.replace(engine.config.model_kwargs, use_infinite_attention=relative)
    engine.config = dataclasses.replace(engine.config, model_kwargs=kwargs)
    prompts = [FIRST] * 5 + [SECOND] * 2
    together = pixels(BatchSession(engine, [3, 4]), prompts)
    for i, seed in enumerate((3, 4)):
        for got, expected in zip(together, pixels(engine.session(seed), prompts, i), strict=True):
            assert (got[i] - expected).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@torch.inference_mode()
def test_films_decode_together_as_alone_on_a_gpu(engine):
    decoder = engine.decoder.to(torch.device("cuda"))
    latents = torch.randn(3, 4, 16, 4, 6, device="cuda")
    together = BatchStream(decoder)
    alone = [decoder.stream() for _ in latents]
    for part in latents.split(2, dim=1):
        expected = torch.cat([stream(one[None]) for stream, one in zip(alone, part, strict=True)])
        torch.testing.assert_close(together(part), expected, rtol=0, atol=0.01)


def test_noise_of_a_batch_is_that_of_its_videos():
    both = StackedNoise([5, 6], (3, 16, 4, 6), torch.device("cpu"))
    assert both.batch == 2
    for i, source in enumerate(NoiseSource(seed, (3, 16, 4, 6)) for seed in (5, 6)):
        assert torch.equal(both.start(2)[i:i + 1], source.start(2))
        assert torch.equal(both.renoise(2, 1)[i:i + 1], source.renoise(2, 1))


def test_all_prompts_of_a_batch_switch_together(engine):
    session = BatchSession(engine, [0, 1])
    with pytest.raises(ValueError, match="3 prompts for 2 videos"):
        session.set_prompts("abc")
    with pytest.raises(ValueError, match="at_switch"):
        BatchSession(engine, [0], at_switch="forget")
    session.set_prompts("ab")
    session.step()
    with pytest.raises(ValueError, match="switch together"):
        session.set_prompts("ac")


def test_the_cache_is_kept_or_cleared_at_a_switch(engine):
    """Until the switch all ways are one; what follows differs. A kept cache has what it would have had without one."""
    films = {}
    for way in ("recache", KEEP, CLEAR):
        session = BatchSession(engine, [0], way)
        films[way] = torch.cat(pixels(session, [["a red ball"]] * 2), 1)
        keys = session.cache.keys[0].clone()
        session.set_prompts(["a blue car"])
        after = session.step_latents()
        if way == CLEAR:
            assert session.cache.positions == [6, 7, 8]
        else:
            assert session.cache.positions == list(range(9))
        if way == KEEP:
            first = 3 * session.cache.tokens
            assert torch.equal(session.cache.keys[0][:, :first], keys[:, :first])
            alone = BatchSession(engine, [0])
            pixels(alone, [["a red ball"]] * 3)
            torch.testing.assert_close(session.cache.keys[0][:, :2 * first], alone.cache.keys[0][:, :2 * first])
        films[way, "after"] = after
    assert torch.equal(films["recache"], films[KEEP]) and torch.equal(films["recache"], films[CLEAR])
    for way, other in (("recache", KEEP), ("recache", CLEAR), (KEEP, CLEAR)):
        assert (films[way, "after"] - films[other, "after"]).abs().max() > 1e-4


def test_prompts_are_held_out_and_repeat():
    films = plan.prompts(20, 240, seed=1)
    assert films == plan.prompts(20, 240, seed=1)
    assert is_held_out(torch.tensor([film.scenes[0] for film in films])).all()
    assert {film.frames for film in films} == {3840} and len({film.seed for film in films}) == 20
    assert plan.prompts(8, 240, seed=1) == films[:8]


def test_timelines_switch_every_twelve_seconds_at_a_block():
    for film in plan.timelines(4, 60, seed=1, block=3):
        assert film.blocks == [0, 16, 32, 48, 64] and film.frames == 960
        assert film.starts(3) == [0, 189, 381, 573, 765]
        assert all(a != b for a, b in pairwise(film.captions))


def test_every_arm_makes_the_same_films():
    films = plan.prompts(5, 6, 0) + plan.timelines(3, 6, 0, 3)
    tasks = list(plan.tasks(films, list(plan.GROUPS), batch=2, ablation_prompts=3, relative=False))
    made = {}
    for task in tasks:
        assert len({film.kind for film in task.films}) == 1 and len(task.films) <= 2
        made.setdefault(task.arm, []).extend(task.films)
    assert made[MAIN] == films and made["base"] == films[:3] + films[5:] and made[KEEP] == films[5:]
    assert "absolute RoPE" not in made and made["relative RoPE"] == films[:3]
    assert len({task.name for task in tasks}) == len(tasks)


def test_statistics_of_plain_pictures():
    flat = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    told = statistics(flat)
    assert told["mean"] == pytest.approx(100) and told["sharpness"] == pytest.approx(0, abs=1e-3)
    assert told["contrast"] == pytest.approx(0, abs=1e-3) and told["saturation"] == 0
    flat[:, :, ::2, 0] = 200
    more = statistics(flat)
    assert more["saturation"] == 50 and more["sharpness"] > 10 and more["contrast"] > 5


def test_changes_are_those_to_the_frame_before():
    video = torch.zeros(300, 2, 2, 3, dtype=torch.uint8)
    video[257:] = 30
    assert changes(video, "cpu").nonzero().tolist() == [[257]] and changes(video, "cpu").max() == 30


class Oracle:
    """A judge that sees a scene's number, which is all that its films show."""

    device = torch.device("cpu")

    def __init__(self, scenes: list[list[int]]):
        self.scenes = torch.tensor([[*scene, 1] for scene in scenes])

    def __call__(self, frames: torch.Tensor, batch: int = 64) -> dict[str, torch.Tensor]:
        shown = (frames[:, frames.shape[1] // 2].float().mean((1, 2, 3)) / 50).round().long()
        names = ATTRIBUTES if frames.shape[1] >= 40 else [n for n in ATTRIBUTES if n not in ("motion", "camera")]
        return {name: self.scenes[shown, ATTRIBUTES.index(name)] for name in names}


def film_of(values: list[int], scenes: list[list[int]], tmp_path) -> tuple[Film, list]:
    """A timeline whose frames are grey, of 50 times the value given for each; its file."""
    film = Film("timeline-000", TIMELINE, 0, scenes, ["a", "b"], [0, 8], len(values))
    frames = torch.tensor(values, dtype=torch.uint8)[None, :, None, None, None] * 50
    with Reels([tmp_path / "a.mp4"], crf=10, workers=1) as reels:
        reels.write(frames.expand(-1, -1, HEIGHT, WIDTH, 3))
    return film, [tmp_path / "a.mp4"]


@pytest.mark.parametrize("late", [0, 8, None])
def test_a_switch_is_measured(tmp_path, late):
    """The second scene, another colour, shows at once, half a second late, or never."""
    scenes = [[0, 0, 8, 0, 0, 0], [0, 4, 8, 0, 0, 0]]
    switch, frames = 93, 190
    shows = frames if late is None else switch + late
    film, paths = film_of([0] * shows + [1] * (frames - shows), scenes, tmp_path)
    assert film.starts(3) == [0, switch]
    row, = measure([film], paths, MAIN, 3, Oracle(scenes), workers=1)
    assert json.loads(json.dumps(row)) == row
    told, = row["switches"]
    assert told["changed"] == ["colour"] and told["before"]["colour"] == 0
    if late is None:
        assert told["after"]["colour"] == 0 and told["delay"] == {"colour": None} and told["change"] < 2
    else:
        assert told["after"]["colour"] == 4 and told["change"] == pytest.approx(50, abs=2)
        assert told["delay"]["colour"] == pytest.approx(max(late, 4) / FPS, abs=2 / FPS)
    assert row["elsewhere"] < 2
    numbers = report.switching([row])
    assert numbers["new shown"]["colour"] == (late is not None) and numbers["others same"]["all"] == 1
    assert report.right_at(row, 1)["all"] and report.right_at(row, 3)["all"] == (late is not None)


def test_cuts_are_told_from_fades():
    def row(*changes: float, changed: str = "colour") -> dict:
        return {"name": "a", "elsewhere": 10.0, "switches": [{"change": c, "changed": [changed]} for c in changes]}

    told = report.cuts([row(5, 14, 40)], {"setting"})
    assert told == {"switches": 3, "no cut": pytest.approx(2 / 3), "median": 1.4, "largest": 4}
    assert report.cuts([row(40, changed="setting")], {"setting"}) is None
    assert report.cuts([row(5, 40)], set(), reference=[row(5, 20)])["largest"] == 2


def test_adherence_counts_films(tmp_path):
    scene = [0] * len(CATEGORIES)
    row = {"kind": PROMPT, "name": "a", "scenes": [scene], "starts": [0], "ends": [40, 80],
           "read": {name: [0, 0] for name in CATEGORIES} | {COUNT: [1, 1]}, "statistics": {}}
    lost = row | {"read": row["read"] | {"colour": [0, 3], COUNT: [0, 1]}}
    told = report.adherence([row, lost])
    assert told["films"] == 2 and told["ever lost"] == 0.5 and told["windows lost"] == 0.25
    assert told["right"]["5"] == dict.fromkeys(ATTRIBUTES, 1.0) | {"colour": 0.5, "all": 0.5}
    assert told["by second"]["2.5"]["count"] == 0.5 and told["ever doubled"] == 0
    assert told["windows right"]["colour"] == 0.75 and told["windows right"]["all"] == 0.5


@pytest.mark.parametrize(("found", "lost", "count", "expected"), [
    (0, 0, 62, (0, -0.0433, 0.0433)),
    (0, 10, 98, (-10 / 98, -0.1650, -0.0350)),
    (30, 0, 100, (0.3, 0.2016, 0.3866)),
])
def test_difference_of_the_same_films_and_its_interval(found, lost, count, expected):
    """Worked out by hand from the formula: p = (found + 1)/(n + 2), q = (lost + 1)/(n + 2)."""
    first = [False] * found + [True] * lost + [True] * (count - found - lost)
    second = [True] * found + [False] * lost + [True] * (count - found - lost)
    assert list(report.difference(first, second).values()) == pytest.approx(expected, abs=1e-4)
    turned = report.difference(second, first)
    assert turned["low"] == pytest.approx(-expected[2], abs=1e-4)


def test_interval_covers_the_true_difference():
    """Nineteen times of twenty; what is drawn is the same everywhere."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        first = rng.random(64) < 0.95
        second = np.where(rng.random(64) < 0.05, ~first, first)
        told = report.difference(first.tolist(), second.tolist())
        inside += told["low"] <= 0.05 * (1 - 2 * 0.95) <= told["high"]
    assert inside > 0.93 * 2000


def test_differences_are_film_by_film():
    scene = [0] * len(CATEGORIES)
    right = {"scenes": [scene], "starts": [0], "ends": [80, 480],
             "read": {name: [0, 0] for name in CATEGORIES} | {COUNT: [1, 1]}}
    wrong = right | {"read": right["read"] | {"colour": [3, 0]}}
    told = report.differences(PROMPT, [right, wrong, right], [wrong, wrong, right])
    assert set(told) == {"5", "30", "all"} and told["5"]["colour"]["difference"] == pytest.approx(-1 / 3)
    assert told["30"]["colour"]["difference"] == 0
    assert told["all"]["colour"] == pytest.approx({"difference": -1 / 6, "low": -0.4933, "high": 0.16}, abs=1e-4)
    assert told["5"]["subject"]["difference"] == 0 and told["5"]["all"] == told["5"]["colour"]

    def switch(**after: int) -> dict:
        shown = dict.fromkeys(CATEGORIES, 0) | {COUNT: 1}
        return {"frame": 9, "changed": ["colour"], "before": shown, "after": shown | after}

    rows = [{"scenes": [scene, scene], "starts": [0, 9], "switches": [one]} for one in (switch(), switch(colour=2))]
    told = report.differences(TIMELINE, rows[:1], rows[1:])["switches"]
    assert {name: d["difference"] for name, d in told.items()} == {
        "new shown": -1, "others same": 0, "others right": 0, "all right": -1}


def test_drawn_films_show_their_scenes(tmp_path):
    scene = [CHOICES[name].index(value) for name, value in
             dataclasses.asdict(Scene("ball", "red", "still", "snow", "noon", "still")).items()]
    night = [*scene[:4], CHOICES["light"].index("night"), scene[5]]
    film = Film("timeline-000", TIMELINE, 0, [scene, night], ["a", "b"], [0, 2], 60)
    frames = torch.cat(list(drawn([film], 60, 3, "cpu")), 1)[0].float()
    assert frames.shape == (60, HEIGHT, WIDTH, 3)
    assert frames[18:22].mean() > 1.5 * frames[-4:].mean()


def test_whole_run_on_the_small_model(tiny_config, tmp_path, capsys):
    """Two processes share the work; a second run makes nothing; the pictures are there."""
    from omegaconf import OmegaConf

    config = dataclasses.replace(tiny_config, height=HEIGHT, width=WIDTH)
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), tmp_path / "small.yaml")
    torch.manual_seed(0)
    Judge(Network()).save(tmp_path / "judge.safetensors")
    out = tmp_path / "measured"
    args = [str(tmp_path / "small.yaml"), "--out", str(out), "--judge", str(tmp_path / "judge.safetensors"), "--device",
            "cpu", "--prompts", "2", "--timelines", "1", "--seconds", "6", "--ablation-prompts", "1", "--workers", "2"]
    evaluate.main([*args, "--only", "main", "--share", "0/2"])
    assert [path.name for path in (out / "parts").iterdir()] == ["main-prompt-000.json"]
    evaluate.main([*args, "--only", "main", "--share", "1/2"])
    assert {path.name for path in (out / "parts").iterdir()} == {"main-prompt-000.json", "main-timeline-000.json"}
    video = out / "videos/main/prompt-000.mp4"
    frames = read_video(video)
    assert len(frames) == 96 and frames.std() > 1
    before = video.stat().st_mtime_ns
    capsys.readouterr()
    evaluate.main([*args, "--only", "main"])
    assert "0 batches to make" in capsys.readouterr().out and video.stat().st_mtime_ns == before
    for part in list((out / "parts").iterdir()):
        rows = [row | {"arm": KEEP} for row in json.loads(part.read_text())]
        part.with_name(part.name.replace("main", "keep")).write_text(json.dumps(rows))
    evaluate.main(["--out", str(out), "--report"])
    for name in ("report.md", "prompts-main.png", "timelines-main.png", "story.webp"):
        assert (out / name).stat().st_size > 100
    text = (out / "report.md").read_text()
    assert "## keep, less main" in text and "| camera | +0.0 (-" in text
    assert "- **main**: the model as" in text and "- **keep**: a new prompt leaves" in text and "**base**" not in text
    told = json.loads((out / "report.json").read_text())
    assert told["arms"][MAIN]["prompts"]["films"] == 2 and set(told["arms"]) == {MAIN, KEEP}
    for kind in (PROMPT, TIMELINE):
        assert told["ablations"][KEEP][kind][KEEP] == told["ablations"][KEEP][kind][MAIN]


def test_films_of_a_prompt_keep_it(engine):
    films = [dataclasses.replace(film, frames=20) for film in plan.prompts(2, 6, 0)]
    frames = np.concatenate([part.numpy() for part in generated(engine, films, MAIN)], 1)
    assert frames.shape == (2, 20, 32, 48, 3)


@pytest.mark.parametrize(("args", "words"), [
    (["--share", "x"], ["--share x must be I/N", "0/2 and 1/2"]),
    (["--share", "3/2"], ["--share 3/2 must be I/N"]),
    (["--share", "0/0"], ["--share 0/0 must be I/N"]),
    (["--batch", "0"], ["--batch 0 must be at least 1"]),
    (["--prompts", "-2"], ["--prompts -2 must be at least 0"]),
    (["--seconds", "nan"], ["--seconds nan", "from 6 to"]),
    (["--seconds", "1"], ["--seconds 1:", "from 6 to"]),
    (["--judge", "nothere"], ["--judge=nothere: no such file", "demo.judge train"]),
    (["--out", "file"], ["--out: can't write in file", "a file, not a folder"]),
    (["--device", "gpu"], ["device=gpu is not"]),
    (["--btach", "2"], ["--btach", "did you mean --batch?"]),
    (["sed=1"], ["unknown key sed"]),
    (["--only", "main", "precision", "--device", "cpu"], ["precision=fp8 needs an NVIDIA GPU", "the device is cpu"]),
])
def test_command_line_that_makes_no_sense(run_here, tmp_path, args, words):
    (tmp_path / "file").write_text("mine")
    outcome = run_here(evaluate, "--out", "measured", *args)
    assert_complains(outcome, *words)
    assert outcome.err.count("\n") == 1 and not (tmp_path / "measured/parts").exists()


def test_report_of_nothing_makes_no_folder(run_here, tmp_path):
    assert_complains(run_here(evaluate, "--report", "--out", "measured"), "measured/parts has no measurements")
    assert not (tmp_path / "measured").exists()


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    assert "(default: 208)" in capsys.readouterr().out
