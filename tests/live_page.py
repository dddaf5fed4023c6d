"""What the tests of the live page share: the system's Chromium, and the page in it."""

import base64
import io
import os
import shutil
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.live_client import LiveServer

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
PATIENCE = 90  # seconds


class Page:
    """The live page in a browser window of its own."""

    def __init__(self, browser, server: LiveServer, **settings):
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True, **settings)
        self.tab = self.context.new_page()
        self.server, self.errors = server, []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, address: str = "") -> None:
        self.tab.goto(address or self.server.address)
        self.wait(lambda: self.state not in ("", "connecting", "loading"))

    def wait(self, true: Callable[[], object], what: str = "") -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, (what, self.state, self.errors, self.text("#composer-note"))
            self.tab.wait_for_timeout(50)

    @property
    def state(self) -> str:
        return self.tab.evaluate("() => document.body?.dataset.state ?? ''")

    @property
    def frame(self) -> int:
        return int(self.tab.evaluate("() => document.querySelector('#picture').dataset.frame ?? -1"))

    @property
    def session(self) -> str:
        return self.tab.url.split("#")[1]

    def text(self, selector: str) -> str:
        return self.tab.inner_text(selector)

    def captured(self) -> dict[int, np.ndarray]:
        """Every frame that was on the canvas, uint8 [H, W, 3]."""
        urls = self.tab.evaluate("() => window.captured")
        return {int(frame): np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))
                for frame, url in urls.items()}

    def type(self, prompt: str) -> None:
        self.tab.fill("#prompt", prompt)
        self.tab.press("#prompt", "Enter")
