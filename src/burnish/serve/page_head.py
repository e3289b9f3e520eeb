"""The begin of the page: icon, style and script are in its head, so nothing is drawn before it has its looks."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect x="1" y="2" width="6" height="12" rx="2" '
    'fill="#889"/><rect x="9" y="2" width="6" height="12" rx="2" fill="#2f5fd0"/></svg>'
)
# Advertisements for the framework's own site, with addresses there.
_CARDS = re.compile(rb'<meta\s+(?:property="og:|name="twitter:)[^>]*>\s*')


class OwnHead:
    """ASGI middleware that rewrites one HTML document's head.

    Args:
        path: of the document.
        style, script: put in as they are.
    """

    def __init__(self, app: ASGIApp, *, path: str, style: str, script: str) -> None:
        self._app = app
        self._path = path
        head = f'<link rel="icon" href="/favicon.ico"><style>{style}</style><script>{script}</script></head>'
        self._head = head.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        start: Message = {}
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = _CARDS.sub(b"", b"".join(parts)).replace(b"</head>", self._head, 1)
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            await send({**start, "headers": [*headers, length, (b"cache-control", b"no-store")]})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)
