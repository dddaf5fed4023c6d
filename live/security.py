"""Who may ask, and how much at a time; in front of everything else."""

import base64
import hashlib
import hmac
import ipaddress
import json
import re
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from live.metrics import Metrics
from utils.errors import UserError

COOKIE = "longlive_token"
OPEN_PATHS = ("/health",)  # for whoever has no token
SHORTEST_TOKEN = 12
DRAINED = 1 << 20  # bytes of a body that is too long which are read before it is refused
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
WITHOUT_TOKEN = Path(__file__).parent / "page" / "token.html"  # for people; programs are told in JSON
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
                               "frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """host: the address that the server listens on. token: what others must know; "" on this machine alone.
    origins: other web pages that may use it, as https://example.org."""

    host: str = "127.0.0.1"
    token: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.token and not is_local(self.host):
            raise UserError(f"--host {self.host} lets other machines in: set a token that they must know, in "
                            f"LONGLIVE_TOKEN or with --token; or leave --host out and use an SSH port-forward")
        if self.token and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()
                           or not self.token.isprintable() or set(self.token) & set(' ;,"\\')):
            raise UserError(f"the token needs at least {SHORTEST_TOKEN} letters, digits, - and _, such as what "
                            f"`openssl rand -hex 16` prints")
        for origin in self.origins:
            if not _is_origin(origin):
                raise UserError(f"--origin {origin} is no origin of a web page; write scheme and host, and the port "
                                f"where it is not the usual one, as https://example.org")


def _is_origin(text: str) -> bool:
    """Whether a browser could say that a page is from there: scheme, host and port only, nothing that goes without
    saying."""
    try:
        parts = urlsplit(text)
        usual = {"http": 80, "https": 443}.get(parts.scheme)
        told = "" if parts.port is None or parts.port == usual else f":{parts.port}"
    except ValueError:
        return False
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return bool(parts.scheme and host) and re.fullmatch(r"[\w.:\[\]-]+", host, re.ASCII) is not None \
        and text == f"{parts.scheme}://{host}{told}"


def is_local(host: str) -> bool:
    """Whether an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: checks host, origin and token, limits bodies, sets headers that browsers heed.

    Without a token the Host header has to be a name of this machine: else a web page could have its own name point
    here, and read what it likes.
    """

    def __init__(self, app: ASGIApp, access: Access, body_bytes: int, metrics: Metrics):
        self.app, self.access, self.body_bytes, self.metrics = app, access, body_bytes, metrics
        self._too_long = f"a request has at most {body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal:
            self.metrics.refused.add()
            await _refuse(scope, receive, send, *refusal)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        elif self._token_in_address(scope):
            await _redirect(send, self.access.token)
        else:
            await self._limited(scope, receive, _with_headers(send), headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or len(origins) > 1:
            return 400, "one Host and at most one Origin header are needed"
        if not self.access.token and _name(hosts[0]) not in (*LOCAL_NAMES, self.access.host):
            return 403, "this server answers to localhost only; use that name, or start it with a token"
        if origins and urlsplit(origins[0]).netloc != hosts[0] and origins[0] not in self.access.origins:
            return 403, "pages of another origin may not use this server"
        if self.access.token and scope["path"] not in OPEN_PATHS and not self._knows_token(scope, headers):
            return 401, "a token is needed: open /?token=… once, or send it as Authorization: Bearer …"
        return None

    def _knows_token(self, scope: Scope, headers: Headers) -> bool:
        given = [headers.get("authorization", "").removeprefix("Bearer ").strip()]
        try:
            cookie = SimpleCookie(headers.get("cookie", ""))
            given.append(cookie[COOKIE].value if COOKIE in cookie else "")
        except CookieError:
            pass
        given.append(self._token_in_address(scope))
        wanted = self.access.token.encode()
        return any(hmac.compare_digest(one.encode(errors="replace"), wanted) for one in given)

    def _token_in_address(self, scope: Scope) -> str:
        """The token in the page's own address, /?token=…"""
        if not self.access.token or scope["path"] != "/" or scope["type"] != "http":
            return ""
        return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]

    async def _limited(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.body_bytes:
            self.metrics.refused.add()
            await _drain(receive)
            await _refuse(scope, receive, send, 413, self._too_long)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.body_bytes:
                await _drain(receive)
                raise HTTPException(413, self._too_long)
            return message

        await self.app(scope, counted, send)


async def _drain(receive: Receive) -> None:
    """Takes the rest of a body, up to a limit: a client that still sends would not see the answer."""
    taken = 0
    while taken < DRAINED:
        message = await receive()
        taken += len(message.get("body", b""))
        if not message.get("more_body"):
            return


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return wrapped


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": message})  # before it is accepted: HTTP 403
        return
    body = json.dumps({"detail": message}, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json")]
    if status == 401 and "text/html" in Headers(scope=scope).get("accept", ""):
        body = WITHOUT_TOKEN.read_bytes()
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _policy_of(body))]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _policy_of(page: bytes) -> bytes:
    """The content security policy of a page that has its style in itself, since it may fetch nothing."""
    style = page[page.index(b"<style>") + len(b"<style>"):page.index(b"</style>")]
    digest = base64.b64encode(hashlib.sha256(style).digest())
    return HEADERS["content-security-policy"].encode() + b"; style-src 'sha256-" + digest + b"'"


async def _redirect(send: Send, token: str) -> None:
    """To the page without the token in its address; the browser keeps it as a cookie that scripts can't read."""
    cookie = f"{COOKIE}={quote(token)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": 303,
                "headers": [(b"location", b"./"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
