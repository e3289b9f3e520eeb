"""A process of our own at the other end of a socket pair, driven by the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

from burnish.serve.channel import LEFT_TO_THE_SERVER, Frames, pack

_STOP_S = 3.0


class Child(asyncio.Protocol):
    """Runs `python -m MODULE DESCRIPTOR`, which ends by itself when its socket closes.

    Args:
        module: what to run.
        on_messages: called in the event loop with the messages that arrived together.
        on_end: called in the event loop once, when the process has closed its end, as it does when it dies.
    """

    def __init__(self, module: str, *, on_messages: Callable[[list[Any]], None], on_end: Callable[[], None]) -> None:
        self._module = module
        self._on_messages = on_messages
        self._on_end = on_end
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The process's exit code, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    async def start(self, first: Any) -> None:
        """Start the process and send it its first message. It is never waited for here."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.to_thread(_spawn, self._module, theirs)
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, sock=ours)
        except BaseException:
            ours.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            raise
        finally:
            theirs.close()
        self.send(first)

    def send(self, message: Any) -> None:
        """Queue a message; to a process that is gone it is dropped, and `on_end` says so."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    def kill(self) -> None:
        """End the process now; `on_end` follows."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """Close the socket, wait for the process to end, and kill it if it does not."""
        self._on_end = _nothing
        if self._transport is not None:
            self._transport.abort()
        await self.reap()

    async def reap(self) -> None:
        """Wait for a process that is ending, so that it leaves no zombie."""
        process = self._process
        if process is None:
            return

        def wait() -> None:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        await asyncio.to_thread(wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        messages = self._frames.feed(data)
        if messages:
            self._on_messages(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        on_end, self._on_end = self._on_end, _nothing
        on_end()


def _nothing() -> None:
    pass


def _spawn(module: str, theirs: socket.socket) -> subprocess.Popen[bytes]:
    # What this process can import, the other one has to find as well: it unpickles functions by their module's name.
    search = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    # Ctrl-C reaches the whole group: what comes before the other process can ignore it waits until then (`take_line`).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_SERVER)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False
