"""Who may use a live server, what it takes, and what it gives away."""

import json
import random
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

import live.server
from live.limits import Limits
from live.messages import parse
from live.refused import Refused
from live.security import Access
from pipeline.engine import Engine
from tests.conftest import tiny_settings
from tests.live_client import LiveServer, wait_until, watching
from utils.errors import UserError

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    return Engine.from_config(tiny_settings(tiny_folder, "unused"))


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with LiveServer(engine, engine.config, tmp_path_factory.mktemp("live"), Limits(bad_messages=2000)) as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


@pytest.fixture(scope="module")
def guarded_server(engine, tmp_path_factory):
    """A server that wants a token."""
    access = Access("0.0.0.0", TOKEN, ("https://example.org",))
    with LiveServer(engine, engine.config, tmp_path_factory.mktemp("guarded"), access=access) as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


@pytest.fixture(autouse=True)
def _ends_sessions(server):
    yield
    server.end_all()


def refused(server: LiveServer, path: str, **headers) -> int:
    """The status that a WebSocket is refused with."""
    from websockets.sync.client import connect

    with pytest.raises(InvalidStatus) as error:
        connect(f"ws://{server.host}{path}", additional_headers=headers, open_timeout=30)
    return error.value.response.status_code


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "http://localhost.evil.example"])
def test_pages_of_other_origins_are_refused(server, origin):
    session = server.create()
    assert refused(server, f"/api/sessions/{session}/live", origin=origin) == 403
    answer = server.http.post("/api/sessions", json={}, headers={"origin": origin})
    assert answer.status_code == 403
    server.http.delete(f"/api/sessions/{session}")


def test_own_origin_is_let_in(server):
    with watching(server) as (session, _), server.watch(session, origin=server.address) as player:
        player.until(lambda: player.states)
    server.http.delete(f"/api/sessions/{session}")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.0.0.1", "[::2]", "]", ""])
def test_other_names_of_this_machine_are_refused(server, host):
    """A web page whose own name is made to point here would come with that name."""
    answer = server.http.get("/api/info", headers={"host": host})
    assert answer.status_code in (400, 403)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN[:-1]},
                                     {"cookie": "longlive_token=wrong"}, {"cookie": "=;=;\"\\"},
                                     {"authorization": b"Bearer \xff\xfe"}])
@pytest.mark.parametrize("path", ["/", "/api/info", "/metrics", "/openapi.json", "/page/main.js"])
def test_no_token_no_answer(guarded_server, path, headers):
    server = guarded_server
    answer = server.http.get(path, headers={"authorization": ""} | headers)
    assert answer.status_code == 401 and "token" in answer.json()["detail"] and TOKEN not in answer.text


def test_no_token_no_websocket(guarded_server):
    session = guarded_server.create()
    path = f"/api/sessions/{session}/live"
    assert refused(guarded_server, path) == 403
    assert refused(guarded_server, path, authorization="Bearer wrong") == 403
    assert refused(guarded_server, f"{path}?token={TOKEN}") == 403  # not in addresses: they are logged
    headers = {"authorization": f"Bearer {TOKEN}"}
    with guarded_server.watch(session, additional_headers=headers) as player:
        player.until(lambda: player.states)
    with guarded_server.watch(session, additional_headers=headers, origin="https://example.org") as player:
        player.until(lambda: player.states)
    with guarded_server.watch(session, additional_headers={"cookie": f"longlive_token={TOKEN}"}) as player:
        player.until(lambda: player.states)


def test_page_keeps_the_token_as_a_cookie(guarded_server):
    anyone = {"authorization": ""}
    guarded_server.http.cookies.clear()
    answer = guarded_server.http.get("/", params={"token": TOKEN}, headers=anyone)
    assert answer.status_code == 303 and answer.headers["location"] == "./"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    guarded_server.http.cookies.clear()
    assert guarded_server.http.get("/", headers=anyone | {"cookie": cookie.split(";")[0]}).status_code == 200
    assert guarded_server.http.get("/", params={"token": "wrong"}, headers=anyone).status_code == 401
    assert guarded_server.http.get("/health", headers=anyone).status_code == 200


@pytest.mark.parametrize(("host", "token", "words"), [
    ("0.0.0.0", "", "--host 0.0.0.0"), ("192.168.0.9", "", "LONGLIVE_TOKEN"), ("::", "", "SSH port-forward"),
    ("127.0.0.1", "short", "at least 12"), ("0.0.0.0", "has spaces in it", "letters"),
])
def test_other_addresses_need_a_token(host, token, words):
    with pytest.raises(UserError, match=words):
        Access(host, token)


@pytest.mark.parametrize("origin", [
    "foo", "*", "null", "", "example.org", "https://", "https://example.org/", "https://example.org/page",
    "https://Example.org", "https://example.org:443", "https://user@example.org", "https://*.example.org",
    "https://example.org:x", "https://example org", "https://exämple.org", "https://example.org?a",
])
def test_origins_that_no_browser_says(origin):
    with pytest.raises(UserError, match="--origin"):
        Access(origins=(origin,))


@pytest.mark.parametrize("origin", ["https://example.org", "http://localhost:3000", "http://[::1]:8000",
                                    "chrome-extension://abcdefghijklmnop"])
def test_origins_that_browsers_say(origin):
    assert Access(origins=(origin,)).origins == (origin,)


@pytest.mark.parametrize(("host", "token", "line"), [
    ("127.0.0.1", "", "Open http://localhost:9/   (Ctrl-C ends it)"),
    ("127.0.0.1", TOKEN, "Open http://localhost:9/?token=TOKEN with your token in place of TOKEN   (Ctrl-C ends it)"),
    ("0.0.0.0", TOKEN, "Open http://198.51.100.7:9/?token=TOKEN with your token in place of TOKEN   (Ctrl-C ends it)"),
    ("10.0.0.9", TOKEN, "Open http://10.0.0.9:9/?token=TOKEN with your token in place of TOKEN   (Ctrl-C ends it)"),
])
def test_address_that_is_told(monkeypatch, caplog, host, token, line):
    """Another machine can open it, and the token is not in the log."""
    class Listener:
        getsockname, close = (lambda _: (host, 9)), (lambda _: None)

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(live.server, "_own_address", lambda family: "198.51.100.7")
    monkeypatch.setattr(live.server, "make_app", stop)
    caplog.set_level("INFO")
    opened = []
    with pytest.raises(Stopped):
        live.server.run(None, Access(host, token), Listener(), [], opened.append)
    assert [record.message for record in caplog.records] == [line]
    assert opened[0].endswith(f"/?token={token}" if token else ":9/") and "0.0.0.0" not in opened[0]


def test_own_address_can_be_opened():
    assert live.server.reachable_name("0.0.0.0") not in ("", "0.0.0.0")
    assert live.server.reachable_name("2001:db8::5") == "[2001:db8::5]"


def test_sessions_and_jobs_are_listed_for_who_knows_the_token(guarded_server):
    session = guarded_server.create(prompt="a")
    job = guarded_server.http.post("/api/jobs", json={"prompts": ["b"], "num_output_frames": 3}).json()["id"]
    (told,) = (one for one in guarded_server.http.get("/api/sessions").json() if one["id"] == session)
    assert told == {"id": session, "status": "unwatched", "seconds": 0, "viewers": 0, "prompt": None}
    assert job in [one["id"] for one in guarded_server.http.get("/api/jobs").json()]
    assert guarded_server.http.get("/api/sessions", headers={"authorization": ""}).status_code == 401
    guarded_server.http.delete(f"/api/sessions/{session}")


def test_browser_without_a_token_is_told_how(guarded_server):
    answer = guarded_server.http.get("/", headers={"authorization": "", "accept": "text/html,*/*;q=0.8"})
    assert answer.status_code == 401 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "/?token=TOKEN" in answer.text and TOKEN not in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_alone_needs_none(host):
    assert Access(host).token == ""


def test_prompts_have_a_length(server):
    with watching(server) as (session, player):
        assert "2001 characters" in player.ask(type="prompt", prompt="a" * 2001)["message"]
        assert player.ask(type="prompt", prompt="  ")["type"] == "error"
        player.send('{"type": "prompt", "prompt": "half \\ud83d"}')
        player.until(lambda: "Invalid JSON" in player.answers[-1]["message"])
        assert player.ask(type="prompt", prompt="🎈" * 2000)["type"] == "ok"
        assert server.http.post(f"/api/sessions/{session}/prompts", json={"prompt": "a" * 2001}).status_code == 422
    server.http.delete(f"/api/sessions/{session}")


def test_bodies_have_a_size(server):
    assert server.http.post("/api/jobs", content=b"[" * 70_000).status_code == 413

    def chunks():
        for _ in range(40):
            yield b" " * 5000

    answer = server.http.post("/api/jobs", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "65536" in answer.json()["detail"]
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "999999999999999999999"])
def test_lengths_that_are_none(server, length):
    with socket.create_connection(server.host.split(":"), timeout=30) as line:
        line.sendall(f"POST /api/jobs HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b" 4" in line.recv(100)


def test_oversized_message_closes_the_connection_alone(server):
    with watching(server, prompt="a") as (session, player), server.watch(session) as other:
        player.send("x" * 40_000)
        assert player.closed().rcvd.code == 1009
        other.until_frame(len(other.frames) + 30)
    server.http.delete(f"/api/sessions/{session}")


def test_too_many_bad_messages_close_the_connection(engine, tmp_path):
    with LiveServer(engine, engine.config, tmp_path, Limits(bad_messages=5)) as server, watching(server) as (_, player):
        for _ in range(6):
            player.send("nonsense")
        assert player.closed().rcvd.code == 1008


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
KEYS = ("prompt", "at", "refresh", "id", "number", "paused", "endless", "seconds", "seed", "take", "frames", "extra")
ALMOST = st.fixed_dictionaries({"type": st.sampled_from(["prompt", "set", "cancel", "restart", "played", "x"])},
                               optional=dict.fromkeys(KEYS, JSON))


@given(st.text(max_size=60) | JSON.map(json.dumps) | ALMOST.map(json.dumps))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_message_or_refused(text):
    try:
        message = parse(text)
    except Refused as no:
        assert no.status == 422 and "\n" not in str(no)[:1]
        return
    assert message.type in ("prompt", "set", "cancel", "restart", "played")


@pytest.mark.parametrize("text", ["[" * 16_000, '{"type":' * 2000, "9" * 16_000, '{"type": "prompt", "prompt": 1e999}'])
def test_texts_that_hurt_some_parsers(text):
    with pytest.raises(Refused):
        parse(text)


@given(st.lists(st.binary(max_size=50) | ALMOST.map(json.dumps) | st.text(max_size=30), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_server_outlives_any_messages(server, messages):
    session = server.create(prompt="a")
    with server.watch(session) as player:
        for message in messages:
            player.send(message)
        assert player.ask(type="set", paused=False, endless=True)["type"] == "ok"
        player.ask(type="restart", seed=1)
        count = len(player.frames)
        player.until(lambda: len(player.frames) > count)
        for answer in player.answers:
            assert "Traceback" not in str(answer) and "/" not in answer.get("message", "").replace("/s", "")
    assert server.http.delete(f"/api/sessions/{session}").status_code == 204


@given(st.sampled_from(["/api/sessions", "/api/jobs"]), JSON)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_server_outlives_any_body(server, path, body):
    answer = server.http.post(path, content=json.dumps(body))
    assert answer.status_code in (201, 202, 422, 429), answer.text
    assert "Traceback" not in answer.text
    for session in list(server.studio._shows):
        server.http.delete(f"/api/sessions/{session}")
    for job in list(server.studio._jobs):
        server.http.delete(f"/api/jobs/{job}")


@pytest.mark.parametrize("path", [
    "/api/sessions/nobody", "/api/sessions/nobody/video.mp4", "/api/sessions/..%2f..%2fetc%2fpasswd/video.mp4",
    "/api/jobs/%2e%2e%2f/video.mp4", "/page/../server.py", "/page/%2e%2e/server.py", "/page/..%2f..%2flive.py",
    "/etc/passwd", "/page/", "/videos/live", "/api/sessions/%00",
])
def test_downloads_only_of_what_the_server_made(server, path):
    answer = server.http.get(path)
    assert answer.status_code in (404, 405)
    assert str(live.__path__[0]) not in answer.text and "Traceback" not in answer.text


def test_unforeseen_error_says_nothing_of_the_server(server, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError(f"secret in {__file__}")

    monkeypatch.setattr(server.studio, "show", fail)
    answer = server.http.get("/api/sessions/x")
    assert answer.status_code == 500 and answer.json() == {"detail": "the server failed; its log says why"}
    assert answer.headers["connection"] == "close"


def test_headers_that_browsers_heed(server):
    headers = server.http.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "server" not in headers


def test_ids_are_not_to_be_guessed(server):
    ids = {server.create() for _ in range(3)}
    assert all(len(one) >= 16 for one in ids)
    for one in ids:
        server.http.delete(f"/api/sessions/{one}")
    for path in ("/api/sessions", "/api/jobs"):  # without a token the ids are all that is secret
        answer = server.http.get(path)
        assert answer.status_code == 403 and "LONGLIVE_TOKEN" in answer.json()["detail"]
    assert server.http.get(f"/api/sessions/{random.Random(0).getrandbits(96):024x}").status_code == 404
