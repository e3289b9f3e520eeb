"""Messages between the server and the processes it starts: pickled frames over a socket pair that nobody else holds."""

from __future__ import annotations

import pickle
import signal
import socket
import struct
import sys
from typing import Any

LEFT_TO_THE_SERVER = frozenset((signal.SIGINT, signal.SIGTERM))
"""Signals that a process which was started never acts on."""
_HEAD = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """One message as a frame: its length in four bytes, then the message."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEAD.pack(len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes as they come; returns the messages that are complete."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= _HEAD.size:
            [length] = _HEAD.unpack_from(buffer, start)
            end = start + _HEAD.size + length
            if len(buffer) < end:
                break
            messages.append(pickle.loads(memoryview(buffer)[start + _HEAD.size : end]))
            start = end
        del buffer[:start]
        return messages


class Line:
    """The blocking end, for the process that was started. Sending from several threads needs a lock of theirs."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._frames = Frames()
        self._ready: list[Any] = []

    def send(self, message: Any) -> None:
        """Raises OSError when the other side is gone."""
        self._socket.sendall(pack(message))

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side is gone.
        """
        while not self._ready:
            try:
                data = self._socket.recv(1 << 18)
            except OSError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._ready = self._frames.feed(data)[::-1]
        return self._ready.pop()


def take_line(*, memory_bytes: int | None = None) -> Line:
    """What a process that was started does first: its line, whose descriptor is its first argument.

    The server decides when this process ends; a signal for the whole group is for the server.

    Args:
        memory_bytes: most address space that it may have from here on; None sets no limit.
    """
    for each in LEFT_TO_THE_SERVER:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_SERVER)
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    return Line(int(sys.argv[1]))


def _limit_memory(num_bytes: int) -> None:
    try:
        import resource
    except ImportError:
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    except (OSError, ValueError):  # a lower limit is set already
        return
