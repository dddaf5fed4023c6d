"""scripts/download.py, run for real against a small hub on the loopback interface."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 10 * 1024 * 1024  # huggingface_hub writes to disk in pieces of this many bytes

WAN = "Wan-AI/Wan2.1-T2V-1.3B"
DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"
BIG = "models/longlive_base.pt"
WAN_FILES = {
    "config.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/spiece.model",
    "Wan2.1_VAE.pth",
}
LONGLIVE_FILES = {BIG, "models/lora.pt", "prompts/long.txt"}
DIFFUSERS_FILES = {
    "model_index.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "vae/config.json",
    "transformer/config.json",
}
OTHERS = {"README.md", "assets/logo.png", "scheduler/scheduler_config.json"}


def make_repos() -> dict[str, dict[str, bytes]]:
    """Repository -> path -> content. BIG is larger than two pieces; all else is small."""

    def content(paths: set[str]) -> dict[str, bytes]:
        return {path: path.encode() * 50 for path in paths}

    return {
        WAN: content(WAN_FILES | OTHERS | {"diffusion_pytorch_model.safetensors"}),
        DIFFUSERS: content(DIFFUSERS_FILES | OTHERS | {"transformer/diffusion_pytorch_model.safetensors"}),
        LONGLIVE: content(LONGLIVE_FILES | OTHERS) | {BIG: os.urandom(1024) * (24 * 1024)},
    }


def is_large(path: str) -> bool:
    """Whether the hub keeps the file in large-file storage, with a SHA-256."""
    return path.endswith((".pt", ".pth", ".safetensors"))


class FakeHub(ThreadingHTTPServer):
    """The two end points that a download uses: the list of a repository's files, and the files.

    status     part of a URL path -> (HTTP status, X-Error-Code) to answer with
    sizes      path -> size to claim in the list
    cut        the connection breaks when BIG reaches this byte, in the next `cuts_left` answers; with `stall`, it hangs
    gets       (path, Range header) of each file that was sent
    tokens     (host, Authorization header) of the requests for files
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = make_repos()
        self.status: dict[str, tuple[int, str]] = {}
        self.sizes: dict[str, int] = {}
        self.cut = PIECE + PIECE // 5
        self.cuts_left = 0
        self.stall = False
        self.closing = threading.Event()
        self.gets: list[tuple[str, str | None]] = []
        self.tokens: set[tuple[str, str | None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of the tests."""


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for fragment, (status, code) in self.server.status.items():
            if fragment in path:
                return self.answer(status, headers={"X-Error-Code": code} if code else None)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            return self.send_list(*match.groups())
        self.server.tokens.add((self.headers["Host"].split(":")[0], self.headers["Authorization"]))
        if match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            return self.redirect(*match.groups()) if is_large(path) else self.send_file(*match.groups())
        if match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        return self.answer(404)

    def send_list(self, repo: str, revision: str) -> None:
        if repo not in self.server.repos:
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, data in self.server.repos[repo].items():
            sibling = {"rfilename": path, "size": self.server.sizes.get(path, len(data)), "blobId": "0" * 40}
            if is_large(path):
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": sibling["size"], "pointerSize": 130}
            siblings.append(sibling)
        return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def redirect(self, repo: str, path: str) -> None:
        """Large files lie on another host."""
        data = self.server.repos[repo][path]
        headers = {
            "Location": f"http://localhost:{self.server.server_port}/storage/{repo}/{path}",
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": COMMIT,
        }
        return self.answer(302, headers=headers)

    def send_file(self, repo: str, path: str) -> None:
        data = self.server.repos[repo][path]
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
        if self.command == "HEAD":
            return self.answer(200, headers=headers)
        wanted = self.headers["Range"]
        self.server.gets.append((path, wanted))
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        headers["Content-Length"] = str(len(data) - start)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = path == BIG and self.server.cuts_left > 0
        self.answer(206 if wanted else 200, data[start : self.server.cut if cut else None], headers)
        if cut:
            self.server.cuts_left -= 1
            self.break_off()

    def break_off(self) -> None:
        self.close_connection = True
        if self.server.stall:
            self.server.closing.wait(30)
            return
        time.sleep(0.3)  # a reset drops what the client has not read yet
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


@pytest.fixture
def hub():
    server = FakeHub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


class Client:
    """Runs the script with its folders, and the hub's own cache, below a temporary folder."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.wan = folder / "wan"
        self.longlive = folder / "longlive"
        inherited = {name: value for name, value in os.environ.items() if not re.match(r"(?i)hf_|.*_proxy$", name)}
        self.env = inherited | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "20",
        }

    def start(self, *options: str) -> subprocess.Popen:
        folders = ("--wan-folder", str(self.wan), "--longlive-folder", str(self.longlive))
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "download.py"), *folders, *options],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str) -> str:
        """Run to the end, which must be a success; returns what was printed."""
        process = self.start(*options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out

    def fail(self, *words: str, options: tuple[str, ...] = ()) -> None:
        """Run to the end, which must be one line on stderr, with these words in it, and exit code 2."""
        process = self.start(*options)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert err.splitlines()[-1] == errors[0]
        for word in words:
            assert word in errors[0]


@pytest.fixture
def client(tmp_path, hub):
    return Client(tmp_path, hub.url)


def files_below(folder: Path) -> dict[str, bytes]:
    """Path -> content, without huggingface_hub's records."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix(): (folder / path).read_bytes() for path in paths if path.parts[0] != ".cache"}


def assert_complete(hub: FakeHub, client: Client) -> None:
    assert files_below(client.wan) == {path: hub.repos[WAN][path] for path in WAN_FILES}
    assert files_below(client.longlive) == {path: hub.repos[LONGLIVE][path] for path in LONGLIVE_FILES}


def big_ranges(hub: FakeHub) -> list[str | None]:
    return [wanted for path, wanted in hub.gets if path == BIG]


def test_fetches_what_is_needed_and_a_second_run_fetches_nothing(hub, client):
    out = client.run()
    assert_complete(hub, client)
    assert "total 25.1" in out and "0 complete" in out
    assert len(hub.gets) == len(WAN_FILES | LONGLIVE_FILES)

    hub.gets.clear()
    assert "8 complete, 0 B to download" in client.run()
    assert hub.gets == []
    assert_complete(hub, client)


def test_dry_run_lists_and_touches_nothing(hub, client):
    out = client.run("--dry-run", "--with-base-generator")
    for path in WAN_FILES | LONGLIVE_FILES | {"diffusion_pytorch_model.safetensors"}:
        assert path in out
    assert "25.17 MB" in out and "README.md" not in out
    assert hub.gets == []
    assert not client.wan.exists() and not client.longlive.exists()


def test_diffusers_layout_in_place_of_the_native_one(hub, client):
    del hub.repos[LONGLIVE]["prompts/long.txt"]  # the prompts are optional
    hub.repos[LONGLIVE][BIG] = b"small"
    client.run("--diffusers")
    assert files_below(client.wan) == {path: hub.repos[DIFFUSERS][path] for path in DIFFUSERS_FILES}
    client.run("--diffusers", "--with-base-generator")
    assert set(files_below(client.wan)) == DIFFUSERS_FILES | {"transformer/diffusion_pytorch_model.safetensors"}


def test_token_goes_to_the_hub_and_not_to_the_storage_host(hub, client):
    client.env["HF_TOKEN"] = "hf_secret"
    client.run()
    assert hub.tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_revision_of_one_repository(hub, client):
    assert f"{LONGLIVE} @ {COMMIT}" in client.run("--dry-run", "--revision", f"longlive={COMMIT}")
    client.fail("no revision v9", "404", WAN, options=("--revision", "v9"))


def test_connection_that_breaks_is_taken_up_in_the_same_run(hub, client):
    hub.cuts_left = 1
    client.run()
    assert big_ranges(hub) == [None, f"bytes={PIECE}-"]
    assert_complete(hub, client)


def test_connection_that_stays_broken_is_taken_up_by_the_next_run(hub, client):
    hub.cuts_left = 2
    client.fail("cannot reach the hub", "resumes")
    assert not (client.longlive / BIG).exists()

    hub.gets.clear()
    assert "10.49 MB on disk" in client.run()
    assert big_ranges(hub) == [f"bytes={PIECE}-"]
    assert_complete(hub, client)


def test_partial_file_with_wrong_bytes_is_not_accepted(hub, client):
    digest = hashlib.sha256(hub.repos[LONGLIVE][BIG]).hexdigest()
    part = client.longlive / f"{BIG}.{digest[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(PIECE))
    client.run()
    assert big_ranges(hub) == [f"bytes={PIECE}-", None]
    assert_complete(hub, client)


def test_ctrl_c_exits_130_and_the_next_run_resumes(hub, client):
    hub.cuts_left, hub.stall = 1, True
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    process = client.start()
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size == PIECE for part in client.longlive.glob("models/*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "resume" in err.splitlines()[-1] and "Traceback" not in err

    hub.gets.clear()
    client.run()
    assert big_ranges(hub) == [f"bytes={PIECE}-"]
    assert_complete(hub, client)


@pytest.mark.parametrize(
    ("where", "status", "code", "words"),
    [
        ("/api/models/" + WAN, 401, "", ("401", WAN, "HF_TOKEN", "hf auth login")),
        ("/api/models/" + WAN, 403, "", ("403", WAN, "licence")),
        ("/api/models/" + LONGLIVE, 404, "RepoNotFound", ("404", LONGLIVE)),
        ("/api/models/" + WAN, 429, "", ("429", "run again")),
        ("/resolve/", 401, "GatedRepo", ("gated", WAN, "HF_TOKEN", "accept")),
        ("/resolve/", 403, "GatedRepo", ("gated", WAN, "open http://127.0.0.1", "accept")),
        ("/resolve/", 403, "", ("403", WAN, "licence")),
        ("models_t5", 404, "EntryNotFound", ("404", "models_t5_umt5-xxl-enc-bf16.pth")),
    ],
)
def test_refusals_of_the_hub(hub, client, where, status, code, words):
    hub.status[where] = (status, code)
    client.fail(*words)


def test_required_file_that_the_repository_lacks(hub, client):
    del hub.repos[LONGLIVE]["models/lora.pt"]
    client.fail("404", LONGLIVE, "models/lora.pt")


def test_hub_that_nobody_runs(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        client = Client(tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}")
        client.fail("cannot reach", "refused", "resumes", "HF_ENDPOINT")


def test_hub_that_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        client.fail("cannot reach", "Timeout", "resumes", "HF_ENDPOINT")


def test_web_server_that_is_no_hub(hub, client):
    hub.status["/api/"] = (200, "")
    client.fail("does not answer like a Hugging Face hub", "HF_ENDPOINT")


def test_offline_mode(client):
    client.env["HF_HUB_OFFLINE"] = "1"
    client.fail("offline mode", "HF_HUB_OFFLINE")


def test_not_enough_disk_space(hub, client):
    hub.sizes[BIG] = 10**18
    client.fail("not enough disk space", "1000000.00 TB needed", "free")
    assert hub.gets == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_disk_that_fills_up(hub, client):
    digest = hashlib.sha256(hub.repos[LONGLIVE][BIG]).hexdigest()
    part = client.longlive / f"{BIG}.{digest[:12]}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    client.fail("disk full", str(client.longlive), "resumes")


def test_folder_that_cannot_be_made(hub, client, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    client.longlive = tmp_path / "file" / "longlive"
    client.fail("cannot write to", str(client.longlive), "--longlive-folder")
    assert hub.gets == []


def test_launcher_passes_its_options_on(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("download.sh", "_env.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts/download.py").write_text("import sys; print(sys.argv[1:])")
    command = ["bash", str(tmp_path / "scripts/download.sh"), "--wan-folder", "a folder"]
    environment = os.environ | {"LONGLIVE_PYTHON": sys.executable}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["['--wan-folder', 'a folder']"]
