"""The live page in headless Chromium, with the small model that comes with this repository."""

import io
import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from demo.judge import SHORTEST, Judge
from demo.world import CHOICES
from live.limits import Limits
from live.packets import jpeg
from live.security import Access
from pipeline.engine import Engine
from tests.frames import decode_errors, read_frames
from tests.live_client import LiveServer, wait_until
from tests.live_page import CHROMIUM, FLAGS, Page
from utils.config import load_config

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; install it (Debian, Ubuntu: apt-get install chromium), or set CHROMIUM")
RED, BLUE = "A red ball bounces on a green meadow at noon.", "A blue ball bounces on a green meadow at noon."
SEA = "A red ball bounces at sea at sunset."
# Keeps a picture of the canvas for each frame that was on it.
CAPTURE = """() => {
  const canvas = document.querySelector("#picture");
  window.captured = {};
  new MutationObserver(() => { window.captured[canvas.dataset.frame] ??= canvas.toDataURL("image/png"); })
    .observe(canvas, { attributes: true, attributeFilter: ["data-frame"] });
}"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_config(load_config("configs/demo_interactive.yaml"))


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    limits = Limits(idle_seconds=3600)
    with LiveServer(engine, engine.config, tmp_path_factory.mktemp("live"), limits) as server:
        wait_until(lambda: not server.studio.stage, "the engine")
        yield server


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server):
    pages = []

    def make(**settings) -> Page:
        pages.append(Page(chromium, server, **settings))
        return pages[-1]

    yield make
    for one in pages:
        one.context.close()
    server.end_all()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def assert_follows(captured: dict[int, np.ndarray], engine: Engine, seed: int, prompts: list[dict]) -> None:
    """The pictures on the canvas are those of the prompts, and from the second prompt on not those of the first."""

    def frames(timeline: dict[int, str]) -> np.ndarray:
        session, made, prompt = engine.session(seed), [], ""
        while sum(map(len, made)) <= max(captured):
            prompt = timeline.get(session.position, prompt)
            session.set_prompt(prompt)
            made.append(session.step())
        return torch.cat(made).numpy()

    followed = frames({one["latent"]: one["prompt"] for one in prompts})
    alone = frames({0: prompts[0]["prompt"]})
    switch = prompts[1]["frame"]
    assert any(index < switch for index in captured) and any(index >= switch for index in captured)
    for index, picture in captured.items():
        expected, other = (np.asarray(Image.open(io.BytesIO(jpeg(one[index])))) for one in (followed, alone))
        assert distance(picture, expected) < 3, index
        if index >= switch:
            assert distance(picture, other) > distance(picture, expected), index


def judged(captured: dict[int, np.ndarray], until: int) -> dict[str, str]:
    """What the judge sees on the canvas in the second up to frame `until`."""
    frames = [captured[index] for index in sorted(captured) if until - 16 <= index < until]
    seen = Judge.load()(torch.from_numpy(np.stack(frames[-SHORTEST:]))[None])
    return {name: CHOICES[name][int(seen[name])] for name in ("setting", "light")}


def test_type_while_it_plays(page, engine, tmp_path):
    one = page()
    one.open()
    assert one.state == "waiting" and "What should the video show?" in one.text("#veil")
    one.tab.evaluate(CAPTURE)
    one.type(RED)
    one.wait(lambda: one.frame > 40, "frames")
    first = one.captured()
    assert len({picture.tobytes() for picture in first.values()}) > 15  # it moves

    one.type(SEA)
    one.wait(lambda: one.tab.get_attribute("#picture", "data-number") == "2", "the first frame under the new prompt")
    one.wait(lambda: "median" in one.text("#f-latency-more"))
    assert float(one.text("#f-latency")) > 0
    made = one.server.state(one.session)
    switch = made["prompts"][1]["frame"]
    one.wait(lambda: one.frame > switch + 32)
    assert [entry["prompt"] for entry in made["prompts"]] == [RED, SEA]
    assert one.tab.locator("#prompts li").count() == 2 and one.tab.locator(".track .segment").count() == 2
    captured = one.captured()
    assert_follows(captured, engine, 0, made["prompts"])
    assert judged(captured, switch) == {"setting": "meadow", "light": "noon"}
    assert judged(captured, switch + 33) == {"setting": "sea", "light": "sunset"}

    one.tab.keyboard.press("Escape")  # out of the prompt box, then by keys alone
    one.tab.keyboard.press("Space")
    one.wait(lambda: one.state == "paused")
    one.tab.wait_for_timeout(500)
    still = one.frame
    one.tab.wait_for_timeout(700)
    assert one.frame == still

    session, frames = one.session, one.server.state(one.session)["frames"]
    one.tab.reload()
    one.wait(lambda: one.state == "paused" and one.frame >= 0, "a picture")
    assert one.session == session and one.frame == frames - 1  # the newest, at once
    one.wait(lambda: one.tab.locator("#prompts li").count() == 2, "the list of prompts")

    downloads = []
    one.tab.on("download", lambda download: downloads.append(download))
    one.tab.keyboard.press("d")
    one.wait(lambda: len(downloads) == 2, "two downloads")
    video, about = (tmp_path / download.suggested_filename for download in downloads)
    for download in downloads:
        download.save_as(tmp_path / download.suggested_filename)
    assert video.suffix == ".mp4" and decode_errors(video) == ""
    assert len(read_frames(video)) == json.loads(about.read_text())["frames"] == frames

    one.tab.keyboard.press("Space")
    one.wait(lambda: one.frame > frames, "play after the reload")
    assert one.errors == []


def test_schedule_on_the_timeline_and_take_back(page):
    one = page()
    one.open()
    one.type(RED)
    one.wait(lambda: one.frame > 5)
    box = one.tab.locator("#track").bounding_box()
    one.tab.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 30)
    assert one.tab.is_checked("#when-at") and one.tab.evaluate("() => document.activeElement.id") == "prompt"
    second = float(one.tab.input_value("#at"))
    one.type(BLUE)
    one.wait(lambda: one.tab.locator(".track .pin").count() == 1)
    (waiting,) = one.server.state(one.session)["scheduled"]
    assert second <= waiting["second"] < second + 0.75
    one.tab.click("#prompts .waits .undo")
    one.wait(lambda: one.tab.locator(".track .pin").count() == 0)

    soon = one.server.state(one.session)["seconds"] + 2.5
    one.tab.check("#when-at", force=True)
    one.tab.fill("#at", f"{soon:.1f}")
    one.type(BLUE)
    one.wait(lambda: len(one.server.state(one.session)["prompts"]) == 2, "the scheduled prompt")
    assert one.server.state(one.session)["prompts"][1]["second"] >= round(soon, 1) - 1e-3
    assert one.errors == []


def test_settings_history_suggestions_and_restart(page):
    one = page()
    one.open()
    one.tab.locator("#suggestions button").first.click()
    one.wait(lambda: one.frame > 5)
    one.type("a second prompt")
    one.tab.press("#prompt", "ArrowUp")
    assert one.tab.input_value("#prompt") == "a second prompt"
    one.tab.press("#prompt", "ArrowUp")
    assert one.tab.input_value("#prompt") == "a red ball"
    one.tab.press("#prompt", "Escape")
    one.tab.select_option("#refresh", "reset")
    one.tab.keyboard.press("e")
    one.wait(lambda: not one.server.state(one.session)["endless"])
    assert one.server.state(one.session)["refresh"] == "reset"
    one.tab.fill("#seed", "7")
    one.tab.press("#seed", "Enter")
    one.wait(lambda: one.server.state(one.session)["take"] == 2)
    assert one.server.state(one.session)["seed"] == 7
    one.wait(lambda: one.tab.get_attribute("#picture", "data-take") == "2")
    assert one.errors == []


def test_lost_connection_comes_back_to_the_same_session(page):
    one = page()
    one.open()
    one.type(RED)
    one.wait(lambda: one.frame > 5)
    session = one.session
    one.server.cut_connections()
    one.wait(lambda: one.state == "lost", "the loss being seen")
    frame = one.frame
    one.wait(lambda: one.frame > frame + 20)
    assert one.session == session


def test_browser_that_is_killed_in_mid_stream(server, tmp_path):
    """The session waits for the next one, with all that was made."""
    session = server.create(prompt=RED)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", f"{server.address}/#{session}"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(lambda: server.state(session)["frames"] > 40, "frames for the browser")
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
    wait_until(lambda: server.state(session)["status"] == "unwatched", "the loss being seen")
    frames = server.state(session)["frames"]
    with server.watch(session) as player:
        player.until_frame(frames + 20)
    server.http.patch(f"/api/sessions/{session}", json={"paused": True})
    made = server.at_rest(session)
    video = tmp_path / "video.mp4"
    video.write_bytes(server.http.get(f"/api/sessions/{session}/video.mp4").content)
    assert decode_errors(video) == "" and len(read_frames(video)) == made["frames"] == made["recorded"]
    server.end_all()


def test_ended_session_offers_a_new_one(page):
    one = page()
    one.open()
    session = one.session
    one.server.http.delete(f"/api/sessions/{session}")
    one.wait(lambda: one.state == "gone")
    one.tab.click("#veil-button")
    one.wait(lambda: one.state == "waiting")
    assert one.session != session


def test_new_begins_another_session_and_back_returns_to_the_first(page):
    one = page()
    one.open()
    one.type(RED)
    one.wait(lambda: one.frame > 5)
    first = one.session
    one.tab.click("#new-session")
    one.wait(lambda: one.state == "waiting")
    second = one.session
    assert second != first
    one.tab.go_back()
    one.wait(lambda: one.state == "playing" and one.session == first)
    one.tab.click("#new-session")
    one.wait(lambda: one.state == "waiting")
    third = one.session
    one.tab.click("#new-session")  # one without a frame does not stay behind
    one.wait(lambda: one.state == "waiting" and one.session != third)
    assert set(one.server.studio._shows) == {first, second, one.session}
    assert one.errors == []


def test_one_may_type_at_once(page):
    one = page()
    one.open()
    one.tab.keyboard.type(RED)
    one.tab.keyboard.press("Enter")
    one.wait(lambda: one.frame > 5)
    assert one.server.state(one.session)["prompt"] == RED


def test_timeline_shows_the_last_minute_or_the_whole_video(page):
    one = page()
    one.open()
    shown = one.tab.evaluate("""async () => {
      const { Timeline } = await import("/page/timeline.js");
      const timeline = new Timeline(document.createElement("div"), document.createElement("div"));
      const prompts = [0, 100, 190].map((second, number) => ({ number, second, prompt: `${second}` }));
      const draw = (whole) => {
        timeline.whole = whole;
        timeline.draw({ prompts, scheduled: [{ number: 9, second: 210, prompt: "later" }], made: 200, shown: 199 });
        return [...timeline.track.children].filter((one) => one.localName === "button")
          .map((one) => [one.textContent, parseFloat(one.style.left)]);
      };
      return { part: draw(false), whole: draw(true), more: timeline.hasMore };
    }""")
    assert shown["more"] and [text for text, _ in shown["part"]] == ["100", "190", "later"]
    assert sorted(text for text, _ in shown["whole"]) == ["0", "100", "190", "later"]
    assert all(0 <= place < 100 for _, place in (*shown["part"], *shown["whole"]))
    assert not one.tab.is_visible("#whole")  # as long as a minute holds all


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize(("width", "height"), [
    (1440, 900), (1024, 700), (820, 1180), (390, 844), (320, 568), (844, 390)])
def test_page_fits_its_window(page, scheme, width, height):
    """Nothing sticks out at the side, and player, prompt box and controls are to be seen."""
    one = page(color_scheme=scheme)
    one.tab.set_viewport_size({"width": width, "height": height})
    one.open()
    assert one.tab.evaluate("() => document.documentElement.scrollWidth") <= width
    for selector in ("#player", "#prompt", "#send", "#pause", "#track"):
        box = one.tab.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 10, selector
    if width < 1000:  # without scrolling, which a player that stays at the top would also cover
        for selector in ("#player", "#send"):
            box = one.tab.locator(selector).bounding_box()
            assert box["y"] + box["height"] <= height, selector
    ground = one.tab.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 384) == (scheme == "dark")


def test_every_control_has_a_name_and_the_keyboard_reaches_it(page):
    one = page()
    one.open()
    nameless = one.tab.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, a")]
      .filter((node) => !node.hidden)
      .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length || node.title))
      .map((node) => node.outerHTML)""")
    assert nameless == []
    reached = set()
    for _ in range(60):
        one.tab.keyboard.press("Tab")
        reached.add(one.tab.evaluate("() => document.activeElement.id"))
    assert {"pause", "endless", "refresh", "seed", "dice", "restart", "fullscreen", "prompt", "send"} <= reached


def test_token_is_typed_once(chromium, engine, tmp_path):
    token = "let-this-browser-in"
    with LiveServer(engine, engine.config, tmp_path, access=Access(token=token)) as server:
        one = Page(chromium, server)
        one.tab.goto(server.address)
        radius = one.tab.evaluate("() => getComputedStyle(document.querySelector('main')).borderRadius")
        assert radius == "14px"  # the policy lets its style through
        one.tab.fill("input", "wrong-" + token)
        one.tab.press("input", "Enter")
        one.tab.wait_for_url("**/?token=wrong-*")
        one.tab.fill("input", token)
        one.tab.press("input", "Enter")
        one.wait(lambda: one.state == "waiting")
        assert token not in one.tab.url
        one.open()
        assert one.state == "waiting"
        one.context.close()


def test_docs_page_lists_the_api(page):
    one = page()
    one.tab.goto(f"{one.server.address}/docs")
    one.wait(lambda: one.tab.locator("details").count() > 10)
    text = one.tab.locator("#content").text_content()
    for told in ("/api/sessions/{identity}/live", "turn_seconds", '{"type": "played"}', "header of 20 bytes"):
        assert told in text
    assert one.errors == []
