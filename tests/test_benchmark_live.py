"""scripts/benchmark_live.py at toy size."""

import json
import random
import time

import pytest

from scripts.benchmark_live import Client, main, percentile, table

SMALL = ["height=32", "width=48", "--random", "toy", "--pause", "0", "0.1", "--lead", "0.3"]


def test_report_of_two_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.benchmark_live.SETTLE", 0.1)
    path = tmp_path / "live.json"
    main([*SMALL, "--prompts", "3", "--sessions", "1", "3", "--json", str(path)])
    about = json.loads(path.read_text())
    assert about["size"] == "32x48" and [run["sessions"] for run in about["results"]] == [1, 3]
    for run in about["results"]:
        assert run["prompts"] == 3  # shared among the sessions
        assert 0 < run["prompt_to_socket_median"] <= run["prompt_to_socket_p95"]
        assert run["prompt_to_socket_median"] <= run["prompt_to_picture_median"]
        assert len(run["longest_gap"]) == len(run["frames_per_second_shown"]) == run["sessions"]
        assert all(rate > 0 for rate in run["frames_per_second_shown"])
        assert {"denoise", "decode", "re-cache"} <= run["block_milliseconds"].keys()
    assert capsys.readouterr().out.splitlines()[-1].startswith("3         3")


def test_run_that_is_cut_short_reports_what_it_has(tmp_path):
    path = tmp_path / "live.json"
    main([*SMALL, "--prompts", "1000", "--sessions", "1", "--most-seconds", "1.5", "--json", str(path)])
    (run,) = json.loads(path.read_text())["results"]
    assert run["prompts"] == 0 and run["prompt_to_socket_median"] is None
    assert "-" in table([run])


def test_session_that_gets_nothing_is_seen_to_starve():
    class Silent:
        def recv(self, timeout):
            time.sleep(timeout)
            raise TimeoutError

    client = Client("host", "session", fps=16, prompts=1, seed=0, most_seconds=0.2)
    client._play(Silent(), random.Random(0))
    assert client.longest_gap >= 0.2 and client.shown == 0


@pytest.mark.parametrize(("values", "share", "result"), [
    ([], 0.5, None), ([2.0], 0.95, 2.0), ([3.0, 1.0, 2.0], 0.5, 2.0), ([3.0, 1.0, 2.0], 0.95, 3.0)])
def test_percentile(values, share, result):
    assert percentile(values, share) == result
