"""What the tests of the live server share: a server in this process, and a player without a picture."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from live.limits import Limits
from live.packets import HEADER, STILL
from live.security import Access
from live.server import listen, make_app, server_config
from live.storage import Storage
from live.studio import Studio
from pipeline.engine import Engine
from utils.config import Config

PATIENCE = 60.0  # seconds; nothing here takes long, but the machine may be busy
LIMITS = Limits(lead_seconds=1.5)


def wait_until(true: Callable[[], object], what: str = "it") -> object:
    """What `true` gives once that is not false."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := true():
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what} never came")


class LiveServer:
    """A live server on a free port of this machine, over an engine that is loaded already."""

    def __init__(self, engine: Engine, config: Config, folder: Path, limits: Limits = LIMITS,
                 access: Access | None = None, load: Callable | None = None):
        self.access, self.folder = access or Access(), folder
        folder.mkdir(parents=True, exist_ok=True)
        self.studio = Studio(config, limits, Storage(folder, limits.disk_bytes), load or (lambda progress: engine), {})
        self._listener = listen("127.0.0.1", 0)
        self.host = f"localhost:{self._listener.getsockname()[1]}"
        self.address = f"http://{self.host}"
        app = make_app(self.studio, self.access, ["a red ball", "a blue ball"])
        self._server = uvicorn.Server(server_config(app, self.studio))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        headers = {"authorization": f"Bearer {self.access.token}"} if self.access.token else {}
        self.http = httpx.Client(base_url=self.address, timeout=PATIENCE, headers=headers)

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        wait_until(lambda: self._server.started, "the server")
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self.http.close()
        self._listener.close()
        assert not self._thread.is_alive()

    def create(self, **body) -> str:
        """A new session; its id."""
        answer = self.http.post("/api/sessions", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def state(self, session: str) -> dict:
        return self.http.get(f"/api/sessions/{session}").json()

    def at_rest(self, session: str) -> dict:
        """The state of a session in which nothing is made any more: that of now and that of half a second ago."""
        end, before = time.monotonic() + PATIENCE, None
        while time.monotonic() < end:
            state = self.state(session)
            if before is not None and (state["frames"], state["recorded"]) == (before["frames"], before["recorded"]):
                return state
            before = state
            time.sleep(0.5)
        raise AssertionError(f"{session} never came to rest")

    def end_all(self) -> None:
        """Ends all sessions."""
        for session in list(self.studio._shows):
            self.http.delete(f"/api/sessions/{session}")

    def cut_connections(self) -> None:
        """Breaks every connection, as a network does that fails."""
        for connection in list(self._server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def watch(self, session: str, **settings) -> "Player":
        return Player(self, session, **settings)

    def figure(self, name: str) -> float:
        """One of the figures for Prometheus."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"longlive_{name} "))


@dataclasses.dataclass
class Frame:
    take: int
    index: int
    number: int
    still: bool
    jpeg: bytes


class Player:
    """A WebSocket client that shows frames as soon as they come, and says so."""

    def __init__(self, server: LiveServer, session: str, plays: bool = True, **settings):
        url = f"ws://{server.host}/api/sessions/{session}/live"
        self.socket = connect(url, open_timeout=PATIENCE, max_size=None, compression=None, **settings)
        self.plays = plays
        self.frames: list[Frame] = []
        self.stills: list[Frame] = []
        self.states: list[dict] = []
        self.answers: list[dict] = []
        self.sent = 0

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            self.socket.close()

    def send(self, message: dict | str | bytes) -> None:
        self.socket.send(json.dumps(message) if isinstance(message, dict) else message)

    def ask(self, **message) -> dict:
        """Sends a message and waits for its answer."""
        self.sent += 1
        self.send({**message, "id": self.sent})
        return self.until(lambda: next((one for one in self.answers if one.get("id") == self.sent), None))

    def prompt(self, prompt: str, **more) -> int:
        answer = self.ask(type="prompt", prompt=prompt, **more)
        assert answer["type"] == "ok", answer
        return answer["number"]

    @property
    def status(self) -> str:
        return self.states[-1]["status"] if self.states else ""

    def take_one(self, timeout: float) -> None:
        """Takes what comes next. Raises TimeoutError, or ConnectionClosed."""
        item = self.socket.recv(timeout)
        if isinstance(item, str):
            message = json.loads(item)
            (self.states if message["type"] == "state" else self.answers).append(message)
            return
        _, flags, take, index, number, _ = HEADER.unpack_from(item)
        frame = Frame(take, index, number, bool(flags & STILL), item[HEADER.size:])
        if frame.still:
            self.stills.append(frame)
            return
        self.frames.append(frame)
        if self.plays:
            self.send({"type": "played", "take": take, "frames": index + 1})

    def until(self, true: Callable[[], object]) -> object:
        """Takes what comes until `true` gives something."""
        end = time.monotonic() + PATIENCE
        while not (result := true()):
            assert time.monotonic() < end, (self.states[-1:], self.answers[-3:], len(self.frames))
            with contextlib.suppress(TimeoutError):
                self.take_one(0.2)
        return result

    def until_frame(self, index: int) -> None:
        self.until(lambda: self.frames and self.frames[-1].index >= index)

    def until_number(self, number: int) -> Frame:
        """The first frame under a prompt."""
        return self.until(lambda: next((frame for frame in self.frames if frame.number >= number), None))

    def settle(self, seconds: float = 0.5) -> None:
        """Takes all that comes until nothing did for a while."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.take_one(seconds)

    def closed(self) -> ConnectionClosed:
        """How the server closed the connection."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                self.take_one(0.2)
            except TimeoutError:
                continue
            except ConnectionClosed as closed:
                return closed
        raise AssertionError("the connection was never closed")


@contextlib.contextmanager
def watching(server: LiveServer, **body) -> Iterator[tuple[str, Player]]:
    """A new session and its player."""
    session = server.create(**body)
    with server.watch(session) as player:
        yield session, player
