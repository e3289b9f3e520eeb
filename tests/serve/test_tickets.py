"""A ticket hands on what arrived, in order, and gives back each answer's room exactly once."""

from __future__ import annotations

import asyncio

import pytest

from burnish.errors import RequestError, WorkerError
from burnish.serve.messages import Failed, Piece, Queued
from burnish.serve.tickets import Gone, Ticket


def ticket(left: list[int], *, count: int = 1, choices: int = 2) -> Ticket:
    return Ticket(5, count=count, choices=choices, on_ended=left.append)


def test_pieces_that_wait_come_together_and_ends_are_counted() -> None:
    async def run() -> list[int]:
        left: list[int] = []
        waiting = ticket(left)
        reader = asyncio.create_task(waiting.news())
        await asyncio.sleep(0)
        waiting.take(Queued(5))
        waiting.take(Piece(5, 0, "a", (1,)))
        waiting.take(Piece(5, 1, "b", (2,), finish_reason="stop"))
        waiting.wake()
        assert [piece.text for piece in await reader] == ["a", "b"]
        assert not waiting.done
        waiting.take(Piece(5, 0, "", (), finish_reason="length"))
        assert waiting.done
        waiting.fail(Gone())
        assert [piece.finish_reason for piece in await waiting.news()] == ["length"]
        return left

    assert asyncio.run(run()) == [1, 1]


@pytest.mark.parametrize(("by_request", "kind"), [(True, RequestError), (False, WorkerError)])
def test_a_failure_reaches_the_reader_and_frees_what_is_missing(by_request: bool, kind: type[Exception]) -> None:
    async def run() -> list[int]:
        left: list[int] = []
        waiting = ticket(left, count=2)
        waiting.take(Piece(5, 0, "a", (1,), finish_reason="stop"))
        waiting.take(Failed(6, "no", by_request))
        waiting.take(Piece(5, 1, "late", (1,), finish_reason="stop"))
        assert waiting.done
        assert waiting.failed
        with pytest.raises(kind, match="no"):
            await waiting.news()
        return left

    assert asyncio.run(run()) == [1, 3]


def test_a_reader_that_takes_nothing_is_gone_before_memory_is() -> None:
    async def run() -> None:
        left: list[int] = []
        waiting = ticket(left, choices=1)
        for _ in range(200):
            waiting.take(Piece(5, 0, "x", tuple(range(100))))
        assert left == [1]
        assert not waiting._pieces
        with pytest.raises(Gone):
            await waiting.news()

    asyncio.run(run())
