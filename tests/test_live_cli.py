"""live.py's command line and its terminal mode, and what the live parts compute without a server."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import Future

import pytest

import live.terminal
from live.cli import parse, suggestions
from live.metrics import Histogram, Metrics
from live.storage import Storage
from live.take import Change, Take
from live.terminal import play
from tests.conftest import REPOSITORY, assert_complains
from tests.frames import decode_errors, read_frames
from tests.live_client import wait_until
from tests.stopped import wait_for_frames
from utils.config import load_config
from utils.errors import UserError

_spec = importlib.util.spec_from_file_location("live_front_end", REPOSITORY / "live.py")  # `live` is the package
front_end = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(front_end)



def videos_made(folder) -> list:
    return sorted(folder.glob("live-*.mp4"))


@pytest.mark.parametrize(("args", "words"), [
    (["--terminl"], ["--terminl", "did you mean --terminal"]),
    (["--host", "0.0.0.0"], ["--host 0.0.0.0", "LONGLIVE_TOKEN"]),
    (["--port", "70000"], ["--port 70000", "65535"]),
    (["--max-sessions", "0"], ["--max-sessions", "above 0"]),
    (["--max-sessions", "0.5"], ["--max-sessions", "whole number"]),
    (["--max-sessions", "1.7"], ["--max-sessions 1.7", "whole number"]),
    (["--disk-gb", "1e-10"], ["--disk-gb", "at least 1"]),
    (["--origin", "foo"], ["--origin foo", "https://example.org"]),
    (["--disk-gb", "nan"], ["--disk-gb"]),
    (["--prompt", "a"], ["--terminal"]),
    (["--terminal", "--seconds", "-1"], ["--seconds"]),
    (["--terminal", "--prompt", " "], ["--prompt", "empty"]),
    (["prompts.txt"], ["prompts.txt", ".yaml"]),
    (["a.yaml"], ["one config at a time"]),
    (["sead=1"], ["unknown key", "seed"]),
    (["--output-folder", "/proc/nowhere"], ["--output-folder", "/proc/nowhere"]),
    (["--host", "203.0.113.9", "--token", "0123456789abcdef"], ["can't listen on 203.0.113.9"]),
])
def test_command_line_that_makes_no_sense(run_here, args, words):
    assert_complains(run_here(front_end, *args), *words)


def test_port_that_is_taken(run_here):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_complains(run_here(front_end, "--port", port, "--no-browser"), f"port {port}", "--port")


def test_token_from_the_environment(tiny_yaml, monkeypatch):
    monkeypatch.setenv("LONGLIVE_TOKEN", "0123456789abcdef")
    task = parse([str(tiny_yaml), "--host", "0.0.0.0", "--max-minutes", "1.5", "--disk-gb", "2"])
    assert task.access.token == "0123456789abcdef"
    assert task.limits.session_seconds == 90 and task.limits.disk_bytes == 2 * 10**9


def test_suggestions_are_the_shipped_prompts():
    found = suggestions(load_config("configs/demo_interactive.yaml"))
    story = json.loads((REPOSITORY / "demo/stories.jsonl").read_text("utf-8").splitlines()[0])
    assert set(story["prompts"]) <= set(found) and 5 <= len(found) <= 60
    assert len(set(found)) == len(found)
    assert suggestions(load_config(None)) == []


@pytest.fixture
def all_lines_are_there(monkeypatch):
    """The lines of a pipe have all come before the first block is made."""
    class AtOnce:
        def __init__(self, target, args, daemon):
            self.start = lambda: target(*args)

    monkeypatch.setattr(live.terminal, "threading", types.SimpleNamespace(Thread=AtOnce))


@pytest.mark.usefixtures("all_lines_are_there")
def test_piped_prompts(run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n\n@1 a blue ball\n@0.1 \nx\n@2 a \ud83d\n"))
    outcome = run_here(front_end, "--terminal", "--seconds", "2", "--prompt", "first")
    assert outcome.code == 0, outcome.err
    (video,) = videos_made(tmp_path / "videos/live")
    assert len(read_frames(video)) == 32 and decode_errors(video) == ""
    about = json.loads(video.with_suffix(".json").read_text())
    assert [one["prompt"] for one in about["plan"]] == ["x", "a blue ball"]
    assert "surrogate" in outcome.err


@pytest.mark.parametrize("line", ["@x foo", "@-1 neg", "@abc x", "@1", "@ foo", "@1e3 x", "@" + "9" * 400 + " x"])
def test_line_with_an_at_sign_that_is_no_time(run_here, monkeypatch, tmp_path, line):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a red ball\n{line}\n"))
    outcome = run_here(front_end, "--terminal", "--seconds", "0.5")
    assert outcome.code == 0, outcome.err
    (said,) = (one for one in outcome.err.splitlines() if "'@12 a prompt'" in one)
    assert said.startswith(line[:90])
    (about,) = (json.loads(path.read_text()) for path in (tmp_path / "videos/live").glob("*.json"))
    assert [one["prompt"] for one in about["plan"]] == ["a red ball"]


@pytest.mark.usefixtures("all_lines_are_there")
def test_prompts_that_are_never_shown_are_named(run_here, monkeypatch, tmp_path):
    lines = "a\nb\nc\n@1 d\n@1.01 e\n@60 f\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    outcome = run_here(front_end, "--terminal", "--seconds", "2")
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.err.splitlines() if line.startswith("never shown")]
    assert [line.rsplit(" ", 1)[1] for line in said] == ["a", "b", "d", "f"]
    assert ["another prompt" in line for line in said] == [True, True, True, False]
    (about,) = (json.loads(path.read_text()) for path in (tmp_path / "videos/live").glob("*.json"))
    assert [one["prompt"] for one in about["plan"]] == ["c", "e"]


def test_pipe_without_a_length_makes_the_configs(run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n"))
    assert run_here(front_end, "--terminal").code == 0
    (video,) = videos_made(tmp_path / "videos/live")
    assert len(read_frames(video)) == 21


def test_nothing_typed(run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_complains(run_here(front_end, "--terminal", "--seconds", "2"), "no prompt for the start")
    assert list((tmp_path / "videos/live").iterdir()) == []


class Typed(io.TextIOBase):
    """A terminal at which someone types: a line, what they wait for, …, the end."""

    def __init__(self, *items):
        self.items = items

    def isatty(self) -> bool:
        return True

    def __iter__(self):
        for item in self.items:
            if callable(item):
                item()
            else:
                yield item


def test_typed_prompts_take_hold_as_they_come(tiny_yaml, tmp_path):
    def three_blocks_more():
        video = wait_until(lambda: next(tmp_path.glob("*.partial.mp4"), None), "the video")
        wait_for_frames(video, wait_for_frames(video, 1) + 36)

    task = parse([str(tiny_yaml), "--terminal", "--output-folder", str(tmp_path)])
    play(task, Storage(tmp_path, 10**9), {}, Typed("a\n", three_blocks_more, "b\n", three_blocks_more, "\n", "never\n"))
    (video,) = videos_made(tmp_path)
    about = json.loads(video.with_suffix(".json").read_text())
    assert [one["prompt"] for one in about["plan"]] == ["a", "b"]
    assert 21 < about["plan"][1]["frame"] < about["frames"] == len(read_frames(video))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_video(tiny_yaml, tmp_path, number):
    command = [sys.executable, str(REPOSITORY / "live.py"), str(tiny_yaml), "--terminal", "--prompt", "a"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = ""
    while "0.00 s  a" not in line:
        line = process.stderr.readline()
        assert line
    time.sleep(0.5)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in errors, errors
    (video,) = videos_made(tmp_path / "videos/live")
    assert decode_errors(video) == "" and len(read_frames(video)) >= 9


def change(prompt: str, number: int, latent: int = 0, done: bool = True) -> Change:
    embeds: Future = Future()
    if done:
        embeds.set_result(None)
    return Change(prompt, "recache", number, latent, embeds)


def test_take_picks_the_prompt_that_is_due(tiny_config):
    take = Take(tiny_config, 0)
    assert take.pick() is None and not take.can_go_on()
    take.schedule(change("later", 1, 3))
    take.schedule(change("first", 2))
    take.schedule(change("second", 3))
    assert take.pick().prompt == "second"  # of several at one place the last wins
    take.ask(change("slow", 4, done=False))
    assert take.pick() is None and take.wanted == "slow"  # waits for its encoding
    take.next.embeds.set_result(None)
    take.latents = 3
    assert take.pick().prompt == "slow" and not take.scheduled  # typed beats scheduled


@pytest.mark.parametrize(("second", "latent"), [(0, 0), (0.05, 1), (1 / 16, 1), (0.07, 2), (5 / 16, 2), (1, 5)])
def test_second_to_latent(tiny_config, second, latent):
    assert Take(tiny_config, 0).latent_at(second) == latent


def test_failed_encoding_is_raised(tiny_config):
    take = Take(tiny_config, 0)
    take.ask(change("a", 1, done=False))
    take.next.embeds.set_exception(UserError("no text encoder"))
    with pytest.raises(UserError, match="no text encoder"):
        take.pick()


def test_metrics_are_in_prometheus_format():
    metrics = Metrics()
    metrics.block(0.3, 12)
    metrics.block(40.0, 12)
    lines = metrics.text().splitlines()
    assert "longlive_frames_total 24" in lines and "# TYPE longlive_block_seconds histogram" in lines
    assert 'longlive_block_seconds_bucket{le="0.3"} 1' in lines
    assert 'longlive_block_seconds_bucket{le="+Inf"} 2' in lines and "longlive_block_seconds_count 2" in lines
    names = [line.split()[0].split("{")[0] for line in lines if not line.startswith("#")]
    assert all(name.replace("_", "a").isalnum() for name in names)
    assert Histogram((1.0,)).lines("x")[0] == 'x_bucket{le="1.0"} 0'
