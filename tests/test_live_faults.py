"""What goes wrong around a live server: it and its other sessions go on, and no frame is lost from a recording."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

import live.recording
import live.show
from live.limits import Limits
from live.viewer import Viewer
from pipeline.engine import Engine
from pipeline.session import Session
from tests.conftest import REPOSITORY, tiny_settings
from tests.frames import decode_errors, read_frames
from tests.live_client import LiveServer, Player, wait_until, watching
from utils.video import Mp4Writer


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    return Engine.from_config(tiny_settings(tiny_folder, "unused"))


@pytest.fixture
def server(engine, tmp_path):
    with LiveServer(engine, engine.config, tmp_path / "live") as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


def assert_goes_on(server: LiveServer, player: Player) -> None:
    player.until_frame(player.frames[-1].index + 24 if player.frames else 20)


def assert_recorded(server: LiveServer, session: str, path) -> None:
    """The recording has every frame that was made."""
    server.http.patch(f"/api/sessions/{session}", json={"paused": True})
    made = server.at_rest(session)
    assert made["recorded"] == made["frames"]
    path.write_bytes(server.http.get(f"/api/sessions/{session}/video.mp4").content)
    assert decode_errors(path) == "" and len(read_frames(path)) == made["frames"]


def test_browser_that_vanishes_in_mid_stream(server, tmp_path):
    with watching(server, prompt="a") as (other, player):
        session = server.create(prompt="b")
        victim = server.watch(session)
        victim.until_frame(20)
        line = victim.socket.socket
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a goodbye
        os.close(os.dup(line.fileno()))
        line.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: server.state(session)["viewers"] == 0, "the victim's end")
        assert_goes_on(server, player)
        with server.watch(session) as again:
            assert again.until(lambda: again.states)[0]["frames"] >= 21
            assert_goes_on(server, again)
        assert_recorded(server, session, tmp_path / "v.mp4")
        assert server.state(other)["status"] == "generating"


def test_ten_reconnections(server, tmp_path):
    session = server.create(prompt="a")
    seen = []
    for _ in range(10):
        with server.watch(session) as player:
            player.until_frame(seen[-1] + 1 if seen else 0)
            seen += [frame.index for frame in player.frames]
    assert seen == sorted(set(seen))  # each goes on where the last one was
    with server.watch(session):
        assert_recorded(server, session, tmp_path / "v.mp4")
    wait_until(lambda: server.state(session)["viewers"] == 0)


def test_client_that_reads_nothing(server, tmp_path):
    """It has its own share of memory, no more; whoever else watches the same session sees all of it."""
    session = server.create(prompt="a")
    deaf = socket.create_connection(server.host.split(":"), timeout=30)
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    deaf.sendall(f"GET /api/sessions/{session}/live HTTP/1.1\r\nHost: {server.host}\r\nUpgrade: websocket\r\n"
                 "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                 "Sec-WebSocket-Version: 13\r\n\r\n".encode())
    wait_until(lambda: server.state(session)["viewers"] == 1)
    with server.watch(session) as player:
        player.until_frame(500)
        first, last = player.frames[0].index, player.frames[-1].index
        assert [frame.index for frame in player.frames] == list(range(first, last + 1))
        waiting = [len(viewer._frames) for viewer in server.studio.show(session).viewers]
        assert max(waiting) <= 2 * 24 + 24 + 12
        assert_recorded(server, session, tmp_path / "v.mp4")
    deaf.close()


class Now:
    """An event loop that does all at once."""

    def call_soon_threadsafe(self, change):
        change()


def test_viewer_that_takes_nothing_is_given_up(server, monkeypatch):
    """It would keep its session from ever being idle."""
    monkeypatch.setattr(live.show, "STALLED", 0.2)
    with watching(server, prompt="a") as (session, player):
        show, deaf = server.studio.show(session), Viewer(Now(), 60)
        show.attach(deaf)
        player.until(lambda: deaf.stalled_for() > 0.2)
        player.ask(type="set", paused=True)
        player.settle()
        show.drop_stalled()
        assert deaf not in show.viewers and deaf.closed and len(show.viewers) == 1


def test_newest_frames_win():
    viewer = Viewer(Now(), most_frames=5)
    viewer.show([bytes([i]) for i in range(9)], asked_at=1.0)
    assert [packet[0] for packet, _ in viewer._frames] == [4, 5, 6, 7, 8] and viewer.dropped == 4
    for _ in range(1000):
        viewer.send({"type": "ok"})
        viewer.changed()
    assert len(viewer._texts) == 256


def test_thousand_prompts_in_a_second(server, tmp_path):
    with watching(server, prompt="first") as (session, player), watching(server, prompt="b") as (_, other):
        player.until_frame(8)
        for number in range(1000):
            player.send({"type": "prompt", "prompt": f"number {number}"})
        player.until(lambda: server.state(session)["prompt"] == "number 999")
        state = server.state(session)
        assert len(state["prompts"]) < 200  # those in between were never made
        assert state["prompts"][-1]["prompt"] == "number 999" and state["next"] is None
        assert_goes_on(server, player)
        assert_goes_on(server, other)
        assert_recorded(server, session, tmp_path / "v.mp4")


def test_error_of_the_engine_in_one_session(server, monkeypatch, caplog):
    step = Session.step

    def fail(session):
        if session._asked == "bad":
            raise RuntimeError(f"a secret of {__file__}")
        return step(session)

    monkeypatch.setattr(Session, "step", fail)
    with watching(server, prompt="good") as (_, player), watching(server, prompt="fine") as (session, victim):
        victim.until_frame(20)
        victim.prompt("bad")
        victim.until(lambda: victim.status == "failed")
        message = victim.states[-1]["message"]
        assert "its log says why" in message and "secret" not in message and "test_live" not in message
        assert_goes_on(server, player)
        assert server.figure("failures_total") == 1
        video = server.http.get(f"/api/sessions/{session}/video.mp4")
        assert video.status_code == 200  # what was made so far
        victim.prompt("good again")
        assert victim.ask(type="restart")["type"] == "ok"
        victim.until(lambda: victim.frames[-1].take == 2)
        assert server.state(session)["status"] == "generating"


def test_error_of_the_engine_in_a_job(server, monkeypatch):
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda self: 1 / 0 if self.block == 2 else step(self))
    job = server.http.post("/api/jobs", json={"prompts": ["a"], "seconds": 5}).json()["id"]
    wait_until(lambda: server.http.get(f"/api/jobs/{job}").json()["status"] == "failed")
    assert "division" not in server.http.get(f"/api/jobs/{job}").text
    assert server.http.get(f"/api/jobs/{job}/video.mp4").status_code == 200


def test_out_of_memory_is_said(server, monkeypatch):
    def fail(session):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Session, "step", fail)
    with watching(server, prompt="a") as (_, player):
        player.until(lambda: player.status == "failed")
        assert "out of memory" in player.states[-1]["message"] and "GiB" not in player.states[-1]["message"]


def test_disk_full(server, monkeypatch, tmp_path):
    """The video plays on without being recorded; what was recorded is kept."""
    def full(self, frames):
        if self.frames >= 30:
            raise OSError(28, "No space left on device")
        return write(self, frames)

    write = Mp4Writer.write
    with watching(server, prompt="a") as (session, player):
        monkeypatch.setattr(Mp4Writer, "write", full)
        player.until(lambda: player.states and player.states[-1]["recording"])
        assert player.states[-1]["recording"] == "recording stopped: the disk is full"
        assert_goes_on(server, player)
        video = server.http.get(f"/api/sessions/{session}/video.mp4")
        (tmp_path / "v.mp4").write_bytes(video.content)
        assert len(read_frames(tmp_path / "v.mp4")) >= 21
        monkeypatch.undo()
        player.ask(type="restart")
        player.until(lambda: player.states[-1]["take"] == 2 and not player.states[-1]["recording"])


def test_disk_full_under_ffmpeg(engine, monkeypatch, tmp_path):
    """/dev/full is a disk that is full."""
    new = live.recording.Mp4Writer

    class Full(new):
        def __init__(self, path, **settings):
            partial = path.with_name(f"{path.stem}.partial.mp4")
            partial.symlink_to("/dev/full")
            super().__init__(path, **settings)

    monkeypatch.setattr(live.recording, "Mp4Writer", Full)
    with LiveServer(engine, engine.config, tmp_path) as server, watching(server, prompt="a") as (session, player):
        player.until(lambda: player.states and player.states[-1]["recording"])
        assert "recording stopped" in player.states[-1]["recording"]
        assert str(tmp_path) not in player.states[-1]["recording"]
        assert_goes_on(server, player)
        assert server.http.get(f"/api/sessions/{session}/video.mp4").status_code in (200, 404)


def test_recordings_beyond_the_limit_go_oldest_first(engine, tmp_path):
    for day in (1, 2, 3):
        for name, size in (("mp4", 60_000), ("json", 100)):
            path = tmp_path / f"live-2025010{day}-120000-0000000{day}.{name}"
            path.write_bytes(b"x" * size)
            os.utime(path, (day * 1000, day * 1000))
    (tmp_path / "mine.mp4").write_bytes(b"x" * 500_000)
    with LiveServer(engine, engine.config, tmp_path, Limits(disk_bytes=100_000)) as server, \
            watching(server, prompt="a") as (_, player):
        player.until_frame(20)
        wait_until(lambda: not (tmp_path / "live-20250101-120000-00000001.mp4").exists())
        assert not (tmp_path / "live-20250102-120000-00000002.json").exists()
        assert (tmp_path / "live-20250103-120000-00000003.mp4").exists()
        assert (tmp_path / "mine.mp4").exists()


def test_recording_that_takes_all_the_room_stops(engine, tmp_path):
    with LiveServer(engine, engine.config, tmp_path, Limits(disk_bytes=20_000)) as server, \
            watching(server, prompt="a") as (_, player):
        player.until(lambda: player.states and "all the space" in player.states[-1]["recording"])
        assert_goes_on(server, player)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_server_with_whole_recordings(tiny_yaml, tmp_path, number):
    command = [sys.executable, str(REPOSITORY / "live.py"), str(tiny_yaml), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        port = re.search(r"localhost:(\d+)/", process.stderr.readline())[1]
        fake = type("Server", (), {"host": f"localhost:{port}"})
        http = httpx.Client(base_url=f"http://localhost:{port}", timeout=60)
        session = http.post("/api/sessions", json={"prompt": "a"}).json()["id"]
        job = http.post("/api/jobs", json={"prompts": ["b"], "seconds": 600}).json()["id"]
        with Player(fake, session) as player:
            player.until_frame(44)
            wait_until(lambda: http.get(f"/api/jobs/{job}").json()["frames"] > 9)
            process.send_signal(number)
            errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    files = sorted((tmp_path / "videos/live").iterdir())
    assert len(files) == 4 and not [path for path in files if ".partial" in path.name or path.name.endswith(".part")]
    for path in files[1::2]:
        about = json.loads(path.with_suffix(".json").read_text())
        assert decode_errors(path) == "" and len(read_frames(path)) == about["frames"] >= 21
    assert re.findall(r"Job .* stopped after \d+ of (\d+) frames; they are in", errors) == ["9600"]


def test_job_that_is_cut_off_is_not_complete(engine, tmp_path, caplog):
    """Its JSON says what was asked for, so that it can be made again; that of a live take says what there is."""
    with LiveServer(engine, engine.config, tmp_path) as server, watching(server, prompt="a") as (_, player):
        job = server.http.post("/api/jobs", json={"prompts": ["b", "c"], "durations": [300, 300]}).json()["id"]
        wait_until(lambda: server.http.get(f"/api/jobs/{job}").json()["frames"] > 9)
        player.until_frame(20)
    (cut,), (live_take,) = ([json.loads(path.read_text()) for path in tmp_path.glob(f"{kind}-*.json")]
                            for kind in ("job", "live"))
    assert not cut["complete"] and cut["request"]["frames"] == 9600
    assert [one["prompt"] for one in cut["request"]["prompts"]] == ["b", "c"]
    assert 9 <= cut["frames"] == len(read_frames(tmp_path / cut["video"])) < 9600
    assert live_take["complete"] and live_take["request"]["frames"] == live_take["frames"]
    said = [record.message for record in caplog.records if record.message.startswith(f"Job {job[:4]} stopped")]
    assert len(said) == 1 and f"after {cut['frames']} of 9600 frames" in said[0]
