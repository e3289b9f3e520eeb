"""What every request passes before anything looks at it: its key, its size, the time it takes to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from burnish.serve.admission import Busy
from burnish.serve.faults import Fault, fault_of
from burnish.serve.keys import KeyRing

OPEN_PATHS = frozenset(("/health", "/ready"))
GENERATING_PATHS = frozenset(("/v1/completions", "/v1/chat/completions"))


class Guard:
    """ASGI middleware.

    Args:
        keys: None lets everybody in.
        on_refused: called with "unauthorized" for a request without a key.
        check_room: raises `Busy` where there is no room for any answer; asked before a body is read, so that a server
            with too much to do spends next to nothing on those it turns away.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        max_body_bytes: int,
        upload_timeout_s: float,
        on_refused: Callable[[str], None],
        check_room: Callable[[], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_bytes = max_body_bytes
        self._upload_s = upload_timeout_s
        self._on_refused = on_refused
        self._check_room = check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["path"] in GENERATING_PATHS and scope["method"] == "POST":
                self._check_room()
            body = await self._body(scope, receive)
        except (Fault, Busy) as refusal:
            await _answer(send, fault_of(refusal))
            return
        except EOFError:
            return
        await self._app(scope, _replaying(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not self._keys.opens(given[0] if len(given) == 1 else None):
            self._on_refused("unauthorized")
            raise Fault(
                401,
                "a valid API key is needed, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Fault: it is too large or too slow.
            EOFError: the client went away.
        """
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > self._max_bytes):
                raise self._too_large()
        first = await self._next(receive, self._upload_s)
        if not first.get("more_body"):
            return first.get("body", b"")
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._upload_s
        parts, size = [first.get("body", b"")], len(first.get("body", b""))
        while True:
            message = await self._next(receive, until_s - loop.time())
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    async def _next(self, receive: Receive, seconds: float) -> Message:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, seconds))
        except asyncio.TimeoutError:
            raise Fault(
                408, "the body took too long to arrive", code="too_slow", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise EOFError
        return message

    def _too_large(self) -> Fault:
        return Fault(
            413,
            f"the body is too large; expected at most {self._max_bytes} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then what still comes, which is that the client went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Send, fault: Fault) -> None:
    body = fault.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
