"""The web server: page, API and WebSocket over one Studio."""

import asyncio
import contextlib
import logging
import signal
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from live.answers import describe_websocket
from live.api import routes
from live.messages import explain
from live.refused import Refused
from live.security import Access, Guard
from live.studio import Studio
from utils.errors import UserError

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
TIDY_EVERY = 5.0  # seconds
ANY_ADDRESS = ("0.0.0.0", "::")  # to listen on; nothing can be opened there
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # addresses for documentation
GOODBYE = 5  # seconds that open connections get at the end


def make_app(studio: Studio, access: Access, suggestions: list[str]) -> FastAPI:
    """The ASGI application. Its lifespan starts the studio and stops it, which makes all recordings whole."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        studio.start()
        tidying = asyncio.create_task(_tidy(studio))
        try:
            yield
        finally:
            tidying.cancel()
            await run_in_threadpool(studio.stop)

    app = FastAPI(title="LongLive", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
                  description="Video that is made while it plays: sessions that are typed live, and jobs.")
    app.include_router(routes(studio, suggestions, may_list=bool(access.token)))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    describe_websocket(app)
    _explain_errors(app, studio)
    app.add_middleware(Guard, access=access, body_bytes=studio.limits.body_bytes, metrics=studio.metrics)
    return app


def _explain_errors(app: FastAPI, studio: Studio) -> None:
    """Errors are answered in one line that says nothing of the server's files or code."""

    def answer(status: int, message: str) -> JSONResponse:
        studio.metrics.refused.add()
        return JSONResponse({"detail": message}, status)

    app.add_exception_handler(Refused, lambda request, error: answer(error.status, str(error)))
    app.add_exception_handler(UserError, lambda request, error: answer(422, str(error)))
    app.add_exception_handler(RequestValidationError, lambda request, error: answer(422, explain(error.errors())))
    app.add_exception_handler(HTTPException, lambda request, error: answer(error.status_code, str(error.detail)))

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        failed = answer(500, "the server failed; its log says why")
        failed.headers["connection"] = "close"  # uvicorn closes it, and the client is not to ask the next thing there
        return failed

    app.add_exception_handler(Exception, unforeseen)


async def _tidy(studio: Studio) -> None:
    """Ends sessions that nobody watches, for as long as the server runs."""
    while True:
        await asyncio.sleep(TIDY_EVERY)
        try:
            await run_in_threadpool(studio.end_idle)
        except Exception:
            log.exception("Idle sessions could not be ended")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't listen on {host}, port {port}: {reason}; choose another with --port, or end what "
                        f"uses it") from None
    return listener


def reachable_name(host: str) -> str:
    """What stands for the address that a server listens on in an address that a browser opens, on any machine that is
    let in."""
    if host in ("127.0.0.1", "::1"):
        return "localhost"
    if host in ANY_ADDRESS:
        host = _own_address(socket.AF_INET6 if ":" in host else socket.AF_INET)
    return f"[{host}]" if ":" in host else host


def _own_address(family: socket.AddressFamily) -> str:
    """This machine's address on its network, or its name where it has none."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE[family], 9))  # sends nothing: only chooses the way out
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def server_config(app: FastAPI, studio: Studio) -> uvicorn.Config:
    """How uvicorn runs the application: limits on what comes in, no compression of JPEGs, a ping every 10 s."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on",
        ws_max_size=studio.limits.message_bytes, ws_per_message_deflate=False, ws_ping_interval=10, ws_ping_timeout=20,
        timeout_keep_alive=30, timeout_graceful_shutdown=GOODBYE, h11_max_incomplete_event_size=32 << 10,
    )


def run(studio: Studio, access: Access, listener: socket.socket, suggestions: list[str],
        open_page: Callable[[str], bool] | None = webbrowser.open) -> None:
    """Serves until Ctrl-C, SIGTERM or SIGHUP; then all recordings are whole."""
    host, port = listener.getsockname()[:2]
    if access.token:
        log.info("Open http://%s:%d/?token=TOKEN with your token in place of TOKEN   (Ctrl-C ends it)",
                 reachable_name(host), port)
    else:
        log.info("Open http://%s:%d/   (Ctrl-C ends it)", reachable_name(host), port)
    if open_page is not None:
        here = "localhost" if host in ANY_ADDRESS else reachable_name(host)
        open_page(f"http://{here}:{port}/{f'?token={access.token}' if access.token else ''}")
    server = uvicorn.Server(server_config(make_app(studio, access, suggestions), studio))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal ends it as SIGTERM does
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises again what ended it
            server.run(sockets=[listener])
    finally:
        studio.stop()
        listener.close()
    log.info("Ended; recordings are in %s", studio.storage.folder)
