"""The live server as its clients see it, with a very small model."""

import dataclasses
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from live.limits import Limits
from live.packets import jpeg
from live.studio import first_blocks
from pipeline.engine import Engine
from tests.frames import decode_errors, read_frames
from tests.live_client import LIMITS, LiveServer, wait_until, watching
from utils.errors import UserError
from wan.geometry import frames_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    from tests.conftest import tiny_settings

    return Engine.from_config(tiny_settings(tiny_folder, "unused"))


@pytest.fixture(scope="module")
def server(engine, folder):
    with LiveServer(engine, engine.config, folder) as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


@pytest.fixture(autouse=True)
def _ends_sessions(server):
    yield
    server.end_all()


def test_frames_come_in_order_with_index_and_number(server):
    with watching(server, prompt="a red ball") as (_, player):
        player.until_frame(32)
        assert [frame.index for frame in player.frames] == list(range(len(player.frames)))
        assert {frame.number for frame in player.frames} == {1} and {frame.take for frame in player.frames} == {1}
        assert Image.open(io.BytesIO(player.frames[0].jpeg)).size == (48, 32)


def test_frames_are_those_of_the_engine(server, engine):
    with watching(server, prompt="a red ball", seed=5) as (_, player):
        player.until_frame(20)
    session = engine.session(seed=5)
    session.set_prompt("a red ball")
    expected = [jpeg(frame) for frame in torch.cat([session.step(), session.step()]).numpy()]
    assert [frame.jpeg for frame in player.frames[:21]] == expected


def test_prompt_takes_hold_within_two_blocks_and_its_frames_say_so(server):
    with watching(server, prompt="a red ball") as (session, player):
        player.until_frame(20)
        number = player.prompt("a blue ball")
        first = player.until_number(number)
        made = server.state(session)
    assert (first.index - 9) % 12 == 0  # a block's first
    assert [one["prompt"] for one in made["prompts"]] == ["a red ball", "a blue ball"]
    assert made["prompts"][1]["frame"] == first.index
    assert player.states[-1]["fps"] == 16


def test_scheduled_prompt_takes_hold_where_it_was_asked_for(server):
    with watching(server, prompt="a") as (session, player):
        player.until_frame(8)
        second = player.states[-1]["seconds"] + 3
        answer = player.ask(type="prompt", prompt="b", at=second)
        (waiting,) = server.state(session)["scheduled"]
        assert waiting["prompt"] == "b" and waiting["second"] == answer["second"] >= second
        first = player.until_number(answer["number"])
        assert first.index == answer["frame"] == 16 * answer["second"]
        assert second <= first.index / 16 < second + 0.75 and first.index == round(16 * waiting["second"])
        assert server.state(session)["scheduled"] == []


def test_prompt_scheduled_for_the_past_is_refused(server):
    with watching(server, prompt="a") as (_, player):
        player.until_frame(20)
        answer = player.ask(type="prompt", prompt="b", at=0.2)
        assert answer["type"] == "error" and "is made already" in answer["message"]


def test_scheduled_prompt_can_be_taken_back(server):
    with watching(server, prompt="a") as (session, player):
        number = player.prompt("b", at=1000)
        assert player.ask(type="cancel", number=number)["type"] == "ok"
        assert server.state(session)["scheduled"] == []
        assert player.ask(type="cancel", number=number)["type"] == "error"


def test_pause_and_play(server):
    with watching(server, prompt="a") as (session, player):
        player.until_frame(8)
        player.ask(type="set", paused=True)
        player.until(lambda: player.states[-1]["paused"])
        state = server.at_rest(session)
        assert state["status"] == "paused"
        frames = state["frames"]
        player.ask(type="set", paused=False)
        player.until_frame(frames + 11)


def test_nothing_is_made_while_nobody_watches_and_it_goes_on_with_the_next_viewer(server):
    session = server.create(prompt="a")
    assert server.at_rest(session)["frames"] == 0 and server.state(session)["status"] == "unwatched"
    with server.watch(session) as player:
        player.until_frame(20)
    wait_until(lambda: server.state(session)["viewers"] == 0)
    frames = server.at_rest(session)["frames"]
    with server.watch(session) as player:
        player.until_frame(frames + 11)
        assert player.stills[0].index < frames <= player.frames[0].index  # a picture at once, then what is new
        assert player.states[0]["prompts"][0]["prompt"] == "a"


def test_no_more_is_made_than_the_lead(server):
    session = server.create(prompt="a")
    with server.watch(session, plays=False) as player:
        lead = LIMITS.lead_seconds * 16
        player.until(lambda: len(player.frames) > lead)
        made = server.at_rest(session)["frames"]
        assert lead < made <= lead + 12
        player.until(lambda: len(player.frames) == made)
        number = player.prompt("b")
        player.until_number(number)  # a new prompt is worth one block more


def test_restart_with_a_seed_begins_a_new_take_with_the_same_prompt(server, folder):
    with watching(server, prompt="a", seed=1) as (session, player):
        player.until_frame(20)
        player.ask(type="restart", seed=2)
        player.until(lambda: player.frames[-1].take == 2 and player.frames[-1].index >= 8)
        state = server.state(session)
        assert (state["take"], state["seed"], state["prompt"]) == (2, 2, "a")
        second = [frame for frame in player.frames if frame.take == 2]
        assert [frame.index for frame in second] == list(range(len(second)))
        assert second[0].jpeg != player.frames[0].jpeg
        player.ask(type="restart", seed=1)
        player.until(lambda: player.frames[-1].take == 3)
        assert next(frame for frame in player.frames if frame.take == 3).jpeg == player.frames[0].jpeg


def test_restart_drops_scheduled_prompts(server):
    session = server.create(prompt="a")
    server.http.post(f"/api/sessions/{session}/prompts", json={"prompt": "b", "at": 5})
    server.http.post(f"/api/sessions/{session}/restart", json={})
    state = server.state(session)
    assert state["scheduled"] == [] and state["next"]["prompt"] == "a"


def test_restart_before_the_first_block_keeps_the_prompt(server):
    for _ in range(5):
        with watching(server, prompt="a") as (_, player):
            player.ask(type="restart", seed=1)
            player.until(lambda player=player: player.frames and player.frames[-1].take == 2)
        server.end_all()


def test_the_end_and_endless(server):
    with watching(server, prompt="a", endless=False, seconds=1) as (session, player):
        player.until(lambda: player.status == "ended")
        player.settle()
        assert player.frames[-1].index == 20  # whole blocks
        player.ask(type="set", endless=True)
        player.until_frame(32)
        assert server.state(session)["status"] == "generating"


@pytest.mark.parametrize("refresh", ["recache", "keep", "reset"])
def test_download_is_whole_while_it_goes_on_and_can_be_made_again(server, engine, tmp_path, run_here, refresh):
    with watching(server, prompt="a", seed=3, refresh=refresh) as (session, player):
        player.until_frame(60)
        player.until_number(player.prompt("b"))
        counts = []
        for part in range(3):  # each is joined to what there was
            video = server.http.get(f"/api/sessions/{session}/video.mp4")
            about = server.http.get(f"/api/sessions/{session}/video.json").json()
            assert video.status_code == 200 and video.headers["content-type"] == "video/mp4"
            path = tmp_path / f"part{part}.mp4"
            path.write_bytes(video.content)
            counts.append(len(read_frames(path)))
            assert counts[-1] == about["frames"] and decode_errors(path) == ""
            player.until_frame(player.frames[-1].index + 24)
        assert counts[0] < counts[1] < counts[2]
    assert [one["prompt"] for one in about["plan"]] == ["a", "b"]
    (tmp_path / "made.json").write_text(json.dumps(about))
    outcome = run_here(inference, "--remake", "made.json", "--output-folder", "again", config=None)
    assert outcome.code == 0, outcome.err
    again, there = read_frames(tmp_path / "again/made.mp4"), read_frames(path)
    assert again.shape == there.shape and np.abs(again.astype(int) - there).mean() < 3


def test_settings_of_one_session(server):
    with watching(server, prompt="a", overrides={"height": 16, "model_kwargs.sink_size": 6}) as (_, player):
        player.until_frame(8)
        assert Image.open(io.BytesIO(player.frames[0].jpeg)).size == (48, 16)


def test_sessions_take_turns(server):
    """Each of three makes about as many blocks as the others, though one of them asks for more all the time."""
    sessions = [server.create(prompt=prompt) for prompt in "abc"]
    players = [server.watch(session) for session in sessions]
    done = threading.Event()
    threads = [threading.Thread(target=lambda p=p: p.until(done.is_set), daemon=True) for p in players]
    for thread in threads:
        thread.start()
    wait_until(lambda: max(server.state(session)["frames"] for session in sessions) > 200)
    frames = [server.state(session)["frames"] for session in sessions]
    done.set()
    for thread, player in zip(threads, players, strict=True):
        thread.join()
        with player:
            assert [frame.index for frame in player.frames] == list(range(len(player.frames)))
    assert min(frames) > 0.6 * max(frames)


def test_too_many_sessions_and_viewers(engine, tmp_path):
    with LiveServer(engine, engine.config, tmp_path, Limits(sessions=2, viewers=1)) as server:
        first, _ = server.create(), server.create()
        answer = server.http.post("/api/sessions", json={})
        assert answer.status_code == 429 and "2 sessions already" in answer.json()["detail"]
        with server.watch(first), server.watch(first) as second:
            assert second.closed().rcvd.code == 4429
        assert server.http.delete(f"/api/sessions/{first}").status_code == 204
        server.create()


def test_ended_session_closes_its_viewers_and_keeps_its_recording(server, folder):
    with watching(server, prompt="a") as (session, player):
        player.until_frame(20)
        assert server.http.delete(f"/api/sessions/{session}").status_code == 204
        assert player.closed().rcvd.code == 4000
        assert server.http.get(f"/api/sessions/{session}").status_code == 404
    newest = max(folder.glob("live-*.mp4"), key=lambda path: path.stat().st_mtime)
    about = json.loads(newest.with_suffix(".json").read_text())
    assert len(read_frames(newest)) == about["frames"] >= 21
    with server.watch(session) as late:
        assert late.closed().rcvd.code == 4404


def test_idle_session_ends(engine, tmp_path):
    with LiveServer(engine, engine.config, tmp_path, Limits(idle_seconds=0.2)) as server:
        session = server.create()
        with server.watch(session):
            time.sleep(0.3)
            server.studio.end_idle()
            assert session in server.studio._shows
        wait_until(lambda: not server.studio.show(session).viewers)
        time.sleep(0.3)
        server.studio.end_idle()
        assert server.http.get(f"/api/sessions/{session}").status_code == 404


def test_session_that_nobody_watches_makes_room(engine, tmp_path):
    limits = Limits(sessions=2, spare_seconds=600)
    with LiveServer(engine, engine.config, tmp_path, limits) as server:
        watched, left = server.create(), server.create()
        with server.watch(watched):
            assert server.http.post("/api/sessions", json={}).status_code == 429  # not at once: who reloads comes back
            server.studio.limits = dataclasses.replace(limits, spare_seconds=0)
            new = server.create()
            assert set(server.studio._shows) == {watched, new}
        assert server.http.get(f"/api/sessions/{left}").status_code == 404


def test_length_of_a_session_is_limited(engine, tmp_path):
    with (LiveServer(engine, engine.config, tmp_path, Limits(session_seconds=2)) as server,
          watching(server, prompt="a") as (_, player)):
        player.until(lambda: player.status == "ended")
        assert "minutes here" in player.states[-1]["message"]
        player.ask(type="restart")
        player.until(lambda: player.frames[-1].take == 2)


def test_motion_jpeg(server):
    session = server.create(prompt="a")
    with server.http.stream("GET", f"/api/sessions/{session}/stream") as answer:
        assert answer.headers["content-type"].startswith("multipart/x-mixed-replace")
        data = b""
        for chunk in answer.iter_bytes():
            data += chunk
            if data.count(b"--frame") > 12:
                break
    jpeg = data.split(b"\r\n\r\n", 1)[1]
    assert Image.open(io.BytesIO(jpeg)).size == (48, 32)
    wait_until(lambda: server.state(session)["viewers"] == 0, "the stream's end")


def test_job(server, tmp_path):
    answer = server.http.post("/api/jobs", json={"prompts": ["a", "b"], "durations": [1, 1.5], "seed": 4})
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    wait_until(lambda: server.http.get(f"/api/jobs/{job}").json()["status"] == "done", "the job")
    done = server.http.get(f"/api/jobs/{job}").json()
    assert done["frames"] == done["of"] == 40 and done["progress"] == 1
    video = server.http.get(f"/api/jobs/{job}/video.mp4")
    (tmp_path / "job.mp4").write_bytes(video.content)
    assert len(read_frames(tmp_path / "job.mp4")) == 40
    about = server.http.get(f"/api/jobs/{job}/video.json").json()
    assert about["complete"] and about["frames"] == about["request"]["frames"] == 40
    assert [one["prompt"] for one in about["plan"]] == ["a", "b"]
    assert server.http.delete(f"/api/jobs/{job}").status_code == 204
    assert server.http.get(f"/api/jobs/{job}").status_code == 404


def test_job_and_session_share_the_engine(server):
    with watching(server, prompt="a") as (_, player):
        job = server.http.post("/api/jobs", json={"prompts": ["b"], "seconds": 4}).json()["id"]
        player.until(lambda: server.http.get(f"/api/jobs/{job}").json()["status"] == "done")
        count = len(player.frames)
        player.until_frame(count + 23)


def test_cancelled_job(server):
    job = server.http.post("/api/jobs", json={"prompts": ["a"], "seconds": 1000}).json()["id"]
    wait_until(lambda: server.http.get(f"/api/jobs/{job}").json()["frames"] > 0)
    assert server.http.get(f"/api/jobs/{job}/video.mp4").status_code == 409
    assert server.http.delete(f"/api/jobs/{job}").status_code == 204


def test_loading_and_a_model_that_can_not_be_loaded(engine, tmp_path, caplog):
    go_on = threading.Event()

    def load(progress):
        progress("generator")
        go_on.wait()
        raise UserError(f"no weights in {tmp_path}")

    with LiveServer(engine, engine.config, tmp_path, load=load) as server:
        wait_until(lambda: server.http.get("/health").json()["stage"] == "generator")
        assert server.http.get("/health").status_code == 503
        with watching(server, prompt="a") as (_, player):  # one may come before it is loaded
            player.until(lambda: player.states and player.states[-1]["server"]["status"] == "loading")
            go_on.set()
            wait_until(lambda: server.http.get("/health").json()["status"] == "failed")
            assert server.http.get("/health").json()["message"] == "loading failed; the server's log says why"
            assert str(tmp_path) in caplog.text and str(tmp_path) not in server.http.get("/api/info").text


def test_first_blocks_fill_the_window_of_a_gpu(tiny_config):
    assert first_blocks(tiny_config, torch.device("cpu")) == ["a", "a", "b"]
    prompts = first_blocks(tiny_config, torch.device("cuda"))
    assert prompts.index("b") * tiny_config.num_frame_per_block > tiny_config.window and prompts[-1] == "b"
    kwargs = dataclasses.replace(tiny_config.model_kwargs, local_attn_size=-1)
    assert len(first_blocks(dataclasses.replace(tiny_config, model_kwargs=kwargs), torch.device("cuda"))) == 3


def test_session_made_before_the_engine_is_there_begins_with_it(engine, tmp_path):
    go_on = threading.Event()

    def load(progress):
        go_on.wait()
        return engine

    with LiveServer(engine, engine.config, tmp_path, load=load) as server, watching(server, prompt="a") as (_, player):
        player.settle(0.2)
        assert player.frames == []
        go_on.set()
        player.until_frame(frames_of(3) - 1)
