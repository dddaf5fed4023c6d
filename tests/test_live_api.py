"""What the live server's API answers: what it takes, what it refuses and in which words, and what it says of itself."""

import re

import pytest

from live.answers import ErrorMessage, OkMessage, SessionState
from pipeline.engine import Engine
from tests.live_client import LiveServer, wait_until, watching


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    from tests.conftest import tiny_settings

    return Engine.from_config(tiny_settings(tiny_folder, "unused"))


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with LiveServer(engine, engine.config, tmp_path_factory.mktemp("live")) as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


@pytest.fixture(autouse=True)
def _ends_sessions(server):
    yield
    server.end_all()


def test_answer_to_a_prompt_says_where_it_takes_hold_where_that_is_known(server):
    session = server.create()
    later = server.http.post(f"/api/sessions/{session}/prompts", json={"prompt": "b", "at": 1.6}).json()
    assert later == {"number": 1, "frame": 33, "second": 33 / 16}  # the first block that starts at 1.6 s or later
    assert server.http.post(f"/api/sessions/{session}/prompts", json={"prompt": "a"}).json() == \
        {"number": 2, "frame": None, "second": None}


@pytest.mark.parametrize(("body", "words"), [
    ({"seconds": 0, "endless": False}, "seconds"), ({"seconds": 7201, "endless": False}, "beyond the 7200 s"),
])
def test_lengths_that_make_no_sense(server, body, words):
    before = len(server.studio._shows)
    answer = server.http.post("/api/sessions", json=body)
    assert answer.status_code == 422 and words in answer.json()["detail"]
    assert len(server.studio._shows) == before
    session = server.create()
    answer = server.http.patch(f"/api/sessions/{session}", json=body)
    assert answer.status_code == 422 and words in answer.json()["detail"]


def test_prompt_beyond_the_longest_video_is_refused(server):
    with watching(server) as (session, player):
        answer = server.http.post(f"/api/sessions/{session}/prompts", json={"prompt": "b", "at": 100_000})
        assert answer.status_code == 422 and "second 100000 is beyond the 7200 s" in answer.json()["detail"]
        assert "beyond" in player.ask(type="prompt", prompt="b", at=7201)["message"]
        assert "beyond" in player.ask(type="set", seconds=7201)["message"]


@pytest.mark.parametrize(("content", "kind", "detail"), [
    ('{"prompt": "a"}', None, "send the body with the header Content-Type: application/json"),
    ('{"prompt": "a"}', "application/x-www-form-urlencoded",
     "send the body with the header Content-Type: application/json"),
    ("junk", "application/json", "the body is no JSON: Expecting value, at character 0"),
    ("", "application/json", 'needed is a JSON object, such as {"prompt": "a red ball"}'),
    ("[]", "application/json", 'needed is a JSON object, such as {"prompt": "a red ball"}'),
    ('{"promt": "a"}', "application/json", "unknown field promt; did you mean prompt?"),
    ('{"\\ud800": "a"}', "application/json", "unknown field '\\ud800'; known are prompt, at, refresh"),
    ("{}", "application/json", "prompt is needed"),
])
def test_bodies_that_make_no_sense(server, content, kind, detail):
    headers = {} if kind is None else {"content-type": kind}
    answer = server.http.post(f"/api/sessions/{server.create()}/prompts", content=content, headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)


def test_refused_message_keeps_its_id(server):
    with watching(server) as (_, player):
        answer = player.ask(type="prompt", prompt="x", att=3)
        assert answer["type"] == "error" and "unknown field att; did you mean at?" in answer["message"]
        assert player.ask(type="promt", prompt="x")["type"] == "error"
        for text in ("nonsense", "[]", '{"type": "set", "id": true, "x": 1}', '{"type": "set", "id": [1]}'):
            player.answers.clear()
            player.send(text)
            player.until(lambda: player.answers)
            assert player.answers[0]["type"] == "error" and player.answers[0]["id"] is None


@pytest.mark.parametrize(("overrides", "words"), [
    ({"device": 1}, "device can't be set"), ({"sink_size": 3}, "did you mean model_kwargs.sink_size"),
    ({"height": 4000}, "more than this server's"), ({"height": 17}, "height"),
    ({"model_kwargs.local_attn_size": -1}, "more than"), ({"denoising_step_list": list(range(900, 0, -1))}, "steps"),
    ({"model_kwargs.sink_size": 4}, "multiple"), ({"generator_ckpt": "/etc/passwd"}, ""),
    ({"height": "${oc.env:HOME}"}, ""),
])
def test_settings_that_a_session_may_not_have(server, overrides, words):
    answer = server.http.post("/api/sessions", json={"overrides": overrides})
    assert answer.status_code == 422 and words in answer.json()["detail"]
    assert "/root" not in answer.text and "Traceback" not in answer.text


@pytest.mark.parametrize(("body", "words"), [
    ({"prompts": []}, "prompts"), ({"prompts": [" "]}, "empty"), ({"prompts": ["a"] * 200}, "at most 100"),
    ({"prompts": ["a", "b"], "durations": [1]}, "durations"), ({"prompts": ["a"], "seconds": 1e5}, "more than"),
    ({"prompts": ["a"], "num_output_frames": 10**9}, "more than"), ({"prompts": ["a"], "seconds": -1}, "seconds"),
    ({"prompts": ["a"], "color": 1}, "color"), ({"prompts": ["a"], "seed": -1}, "seed"),
])
def test_job_that_makes_no_sense(server, body, words):
    answer = server.http.post("/api/jobs", json=body)
    assert answer.status_code == 422 and words in answer.json()["detail"], answer.text


def test_figures_count_all_that_is_made_and_sent(server):
    """Jobs and the Motion JPEG stream too."""
    def figures() -> dict[str, float]:
        return {name: server.figure(name) for name in ("block_seconds_count", "blocks_total", "frames_sent_total",
                                                       "sent_bytes_total", "frames_total")}

    before = figures()
    job = server.http.post("/api/jobs", json={"prompts": ["a"], "num_output_frames": 6}).json()["id"]
    wait_until(lambda: server.http.get(f"/api/jobs/{job}").json()["status"] == "done", "the job")
    after = figures()
    assert after["blocks_total"] >= before["blocks_total"] + 2
    assert after["frames_total"] >= before["frames_total"] + 21
    assert after["block_seconds_count"] == after["blocks_total"]
    with server.http.stream("GET", f"/api/sessions/{server.create(prompt='a')}/stream") as answer:
        data = b""
        for chunk in answer.iter_bytes():
            data += chunk
            if data.count(b"--frame") > 4:
                break
    sent = figures()
    assert sent["frames_sent_total"] >= before["frames_sent_total"] + 4
    assert sent["sent_bytes_total"] >= before["sent_bytes_total"] + len(data)


def test_health_info_metrics_and_docs(server):
    assert server.http.get("/health").json()["status"] == "ready"
    info = server.http.get("/api/info").json()
    assert info["refresh"] == ["recache", "keep", "reset"] and "a red ball" in info["suggestions"]
    assert server.figure("ready") == 1 and server.figure("block_seconds_count") >= 0
    spec = server.http.get("/openapi.json").json()
    assert {"/api/sessions", "/api/jobs", "/health", "/metrics"} <= spec["paths"].keys()
    for page in ("/", "/docs", "/page/main.js", "/page/style.css"):
        assert server.http.get(page).status_code == 200, page


def test_openapi_describes_answers_and_messages(server):
    spec = server.http.get("/openapi.json").json()
    schemas = spec["components"]["schemas"]
    state = schemas["SessionState"]["properties"]
    assert "seconds" in state["turn_seconds"]["description"] and "take" in state["take"]["description"]
    (socket,) = spec["x-websocket"].values()
    types = {way: [schemas[one["$ref"].split("/")[-1]]["properties"]["type"]["const"] for one in socket[way]]
             for way in ("send", "receive")}
    assert types == {"send": ["prompt", "cancel", "set", "restart", "played"], "receive": ["state", "ok", "error"]}
    told = str(spec)
    assert all(name in schemas for name in re.findall(r"#/components/schemas/(\w+)", told))


def test_answers_are_as_described(server):
    """Nothing is left out of the description, and so of the HTTP API's answers, that the WebSocket tells."""
    with watching(server, prompt="a") as (session, player):
        player.prompt("b", at=100)
        player.until_frame(8)
        player.prompt("c")
        player.until(lambda: player.states[-1]["prompts"])
        for model, told in ((SessionState, player.states[0]), (SessionState, player.states[-1]),
                            (OkMessage, player.answers[0]), (ErrorMessage, player.ask(type="cancel", number=99)),
                            (SessionState, server.state(session))):
            assert model.model_validate(told).model_dump(exclude_unset=True) == told
    studio = server.studio
    assert server.state(session).keys() == {*studio.show(session).state(), "server"}
    job = server.http.post("/api/jobs", json={"prompts": ["a"], "num_output_frames": 3}).json()
    assert job.keys() == studio.job(job["id"]).state().keys()
    assert server.http.get("/health").json().keys() == studio.health().keys()
