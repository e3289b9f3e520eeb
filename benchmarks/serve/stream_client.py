"""A client as light as can be, so that on a small machine it takes little from the server that it measures.

One connection per request, as many browsers and SDKs do without a pool. Events are kept as bytes and read when the
stream has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: 0 where the connection broke before a status line.
        complete: the response ended as its headers promised.
        first_s, end_s: seconds from sending to the first event and to the end.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    left: bool = False
    first_s: float | None = None
    end_s: float = 0.0

    def events(self) -> list[dict[str, Any]]:
        """The stream's JSON events; `done` says whether it ended well."""
        lines = [line[6:] for line in self.body.split(b"\n\n") if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    @property
    def done(self) -> bool:
        return self.complete and self.body.endswith(b"data: [DONE]\n\n")

    def text(self) -> str:
        """The first choice's text, of either kind of request."""
        choices = [choice for event in self.events() for choice in event.get("choices", ()) if choice["index"] == 0]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    def usage(self) -> dict[str, int] | None:
        found = [event["usage"] for event in self.events() if event.get("usage")]
        return found[-1] if found else None

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes, *, leave_after_bytes: int | None, stall: bool) -> None:
        self._request = request
        self._leave_after = leave_after_bytes
        self._stall = stall
        self._buffer = bytearray()
        self._body = bytearray()
        self._head_read = False
        self._length: int | None = None
        self._started_s = 0.0
        self.reply = Reply()
        self.ended: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport: Any = transport
        self._started_s = time.perf_counter()
        self.transport.write(self._request)
        if self._stall:
            self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._head_read:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            status, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            self.reply.status = int(status.split(" ")[1])
            self.reply.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            length = self.reply.headers.get("content-length")
            self._length = None if length is None else int(length)
            self._head_read = True
            del self._buffer[: end + 4]
        self._take()

    def _take(self) -> None:
        if self._length is not None:
            self._body += self._buffer
            self._buffer.clear()
            if len(self._body) >= self._length:
                self._finish(complete=True)
            return
        start = 0
        buffer = self._buffer
        while True:
            line_end = buffer.find(b"\r\n", start)
            if line_end < 0:
                break
            size = int(buffer[start:line_end], 16)
            if len(buffer) < line_end + 2 + size + 2:
                break
            if size == 0:
                self._finish(complete=True)
                return
            if self.reply.first_s is None:
                self.reply.first_s = time.perf_counter() - self._started_s
            self._body += buffer[line_end + 2 : line_end + 2 + size]
            start = line_end + 2 + size + 2
        del buffer[:start]
        if self._leave_after is not None and len(self._body) >= self._leave_after:
            self.reply.left = True
            self._finish(complete=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(complete=False)

    def _finish(self, *, complete: bool) -> None:
        if not self.ended.done():
            self.reply.complete = complete
            self.reply.body = bytes(self._body)
            self.reply.end_s = time.perf_counter() - self._started_s
            self.ended.set_result(self.reply)
        self.transport.abort()


def http_request(path: str, body: dict[str, Any] | None, *, host: str = "127.0.0.1") -> bytes:
    """One request as bytes."""
    payload = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    return head.encode() + b"\r\n" + payload


async def send(
    port: int,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    leave_after_bytes: int | None = None,
    stall_s: float | None = None,
    timeout_s: float = 300.0,
) -> Reply:
    """One request over a connection of its own.

    Args:
        leave_after_bytes: close the connection once so much of the body has come.
        stall_s: read nothing for so long (or until the server closes), then go away.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if stall_s is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await loop.sock_connect(connection, ("127.0.0.1", port))
    except OSError:
        connection.close()
        return Reply()
    _, stream = await loop.create_connection(
        lambda: _Stream(http_request(path, body), leave_after_bytes=leave_after_bytes, stall=stall_s is not None),
        sock=connection,
    )
    if stall_s is not None:
        await asyncio.sleep(stall_s)
        stream.reply.left = True
        stream._finish(complete=False)
        return stream.reply
    try:
        return await asyncio.wait_for(asyncio.shield(stream.ended), timeout_s)
    except asyncio.TimeoutError:
        stream._finish(complete=False)
        return stream.reply


def parse_metrics(page: bytes) -> dict[str, float]:
    """Prometheus' page as `name{labels}` -> value."""
    found = {}
    for line in page.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


async def metrics(port: int) -> dict[str, float]:
    """What the server tells Prometheus now."""
    return parse_metrics((await send(port, "/metrics")).body)
