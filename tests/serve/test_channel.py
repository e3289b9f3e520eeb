"""Messages arrive whole and in order, however their bytes are cut; a child that dies is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.serve.channel import Frames, Line, pack
from burnish.serve.child import Child


@given(st.lists(st.binary(max_size=50)), st.integers(min_value=1, max_value=40))
def test_frames_survive_any_cut(messages: list[bytes], step: int) -> None:
    data = b"".join(pack(message) for message in messages)
    frames = Frames()
    found = [message for start in range(0, len(data), step) for message in frames.feed(data[start : start + step])]
    assert found == messages


def test_a_line_ends_when_the_other_side_goes() -> None:
    ours, theirs = socket.socketpair()
    line = Line(theirs.detach())
    ours.sendall(pack({"a": 1}) + pack("b"))
    assert [line.receive(), line.receive()] == [{"a": 1}, "b"]
    ours.close()
    with pytest.raises(EOFError):
        line.receive()
    line._socket.close()


def test_a_child_that_is_killed_is_noticed_and_leaves_nothing() -> None:
    async def run() -> int | None:
        ended = asyncio.Event()
        heard: list[Any] = []
        child = Child("burnish.serve.template_worker", on_messages=heard.extend, on_end=ended.set)
        await child.start(("{{ messages[0].content }}", {}, "here"))
        child.send((1, [{"role": "user", "content": "x"}], True))
        while len(heard) < 2:
            await asyncio.sleep(0.01)
        assert heard == [(0, None, None), (1, "x", None)]
        os.kill(child.pid, signal.SIGKILL)
        await asyncio.wait_for(ended.wait(), 30)
        await child.reap()
        return child.exit_code

    assert asyncio.run(run()) == -signal.SIGKILL
