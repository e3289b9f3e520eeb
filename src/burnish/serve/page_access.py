"""Who may see the page: the same keys as the API's, typed in once; and what of Gradio's routes is there at all."""

from __future__ import annotations

import hashlib
import html
import re
import secrets
import time
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from burnish.serve.keys import KeyRing

COOKIE = "burnish_page"
_SESSION_S = 12 * 3600
_MOST_SESSIONS = 1_000
_LOGIN_BYTES = 4_096
# Everything comes from here. Gradio's page has scripts of its own inside and makes functions from text.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    # With less, browsers would not say where the form for the key comes from.
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]
# What the page needs; uploads, files of the server's disk and everything else that Gradio has are not reachable.
_GET = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|(assets|static|svelte)/.*)?"
    r"|/gradio_api/(theme\.css|info|startup-events|app_id|heartbeat/[\w-]+|queue/data)/?"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
_LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>burnish</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>body{{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}}
form{{display:grid;gap:.8rem;width:min(20rem,86vw)}}input,button{{font:inherit;padding:.55rem .7rem;border-radius:8px;
border:1px solid #8887}}button{{cursor:pointer}}p{{margin:0}}</style>
<form method="post" action="{action}"><p><b>burnish</b></p>
<label>API key <input name="key" type="password" autocomplete="current-password" required autofocus
 style="width:100%;box-sizing:border-box"></label><button>Open the page</button><p role="alert">{notice}</p></form>
</html>
"""


class PageAccess:
    """ASGI middleware before the page.

    Args:
        prefix: path below which the page is, such as "/ui".
        keys: None lets everybody in.
        on_refused: called with "unauthorized" for a wrong key.
    """

    def __init__(self, app: ASGIApp, *, prefix: str, keys: KeyRing | None, on_refused: Callable[[str], None]) -> None:
        self._app = app
        self._prefix = prefix
        self._keys = keys
        self._on_refused = on_refused
        self._sessions: dict[bytes, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        path, method = scope["path"].removeprefix(self._prefix), scope["method"]
        if not _is_own(scope):
            await _answer(send, 403, b"another site's page asked for this\n")
        elif path == "/login" and method == "POST" and self._keys is not None:
            await self._log_in(scope, receive, send)
        elif not (_GET.fullmatch(path) if method in ("GET", "HEAD") else method == "POST" and _POST.fullmatch(path)):
            await _answer(send, 404, b"there is no such page\n")
        elif self._keys is not None and not self._is_known(scope):
            if path == "/" and method == "GET":
                await self._show_login(send, 401, "")
            else:
                await _answer(send, 401, b"a valid API key is needed\n")
        else:
            await self._app(scope, receive, _with_headers(send))

    def _is_known(self, scope: Scope) -> bool:
        now_s = time.monotonic()
        until_s = self._sessions.get(_digest(_cookie(scope)))
        return until_s is not None and now_s < until_s

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._keys is not None
        body, more = b"", True
        while more and len(body) <= _LOGIN_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            key = parse_qs(body[:_LOGIN_BYTES].decode("utf-8")).get("key", [""])[0]
        except (UnicodeError, ValueError):
            key = ""
        if not self._keys.opens(b"Bearer " + key.strip().encode()):
            self._on_refused("unauthorized")
            await self._show_login(send, 401, "This key does not open it.")
            return
        token = secrets.token_urlsafe(32)
        now_s = time.monotonic()
        known = [each for each in self._sessions.items() if each[1] > now_s][-_MOST_SESSIONS + 1 :]
        self._sessions = dict(known)
        self._sessions[_digest(token)] = now_s + _SESSION_S
        cookie = f"{COOKIE}={token}; Path={self._prefix}; Max-Age={_SESSION_S}; HttpOnly; SameSite=Strict"
        headers = [(b"set-cookie", cookie.encode()), (b"location", f"{self._prefix}/".encode())]
        await _answer(send, 303, b"", headers)

    async def _show_login(self, send: Send, status: int, notice: str) -> None:
        text = _LOGIN_PAGE.format(action=html.escape(f"{self._prefix}/login"), notice=html.escape(notice))
        await _answer(send, status, text.encode(), [(b"content-type", b"text/html; charset=utf-8")])


def _digest(token: str) -> bytes:
    # Looking a digest up tells nothing about how much of a token was right.
    return hashlib.sha256(token.encode()).digest()


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _cookie(scope: Scope) -> str:
    try:
        morsel = SimpleCookie(_header(scope, b"cookie")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def _is_own(scope: Scope) -> bool:
    """No browser sends this for another site's page."""
    origin = _header(scope, b"origin")
    return not origin or urlsplit(origin).netloc == _header(scope, b"host")


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    own = [*headers, *_HEADERS, (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})
