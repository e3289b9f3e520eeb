"""Messages between the server and the processes it starts: pickled frames over a socket pair that nobody else holds."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

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
