"""Requests on their way through the engine, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from burnish.errors import BurnishError, RequestError, WorkerError
from burnish.serve.messages import Failed, Piece, Queued

# A reader that leaves so much lying is not reading at all; the answers' pieces would fill the memory.
_MOST_TOKENS_WAITING = 16384


class Gone(Exception):
    """The client went away; nobody waits for the answer."""


class Ticket:
    """The engine's requests for one HTTP request, one for each of its prompts, followed together.

    Pieces that arrive while their reader is busy wait here and are handed over at once; if there are far too many,
    their reader counts as gone.

    Args:
        first_number: the engine's requests are numbered from here on.
        count: how many there are.
        choices: answers of each.
        on_ended: called with how many answers ended, as they do; for those that never will when the ticket is closed.
    """

    def __init__(self, first_number: int, *, count: int, choices: int, on_ended: Callable[[int], None]) -> None:
        self.numbers = range(first_number, first_number + count)
        self.unfinished = count * choices
        self._choices = choices
        self._on_ended = on_ended
        self._unqueued = count
        self._pieces: list[Piece] = []
        self._tokens_waiting = 0
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Nothing more will come from the engine."""
        return self.unfinished == 0 or self._error is not None

    @property
    def failed(self) -> bool:
        """It ended before its answers did."""
        return self._error is not None

    def take(self, message: Piece | Queued | Failed) -> None:
        """Accept the engine's news; `wake` follows."""
        if self._error is not None:
            return
        if isinstance(message, Piece):
            self._pieces.append(message)
            self._tokens_waiting += len(message.token_ids)
            if self._tokens_waiting > _MOST_TOKENS_WAITING:
                self.fail(Gone())
                return
            if message.finish_reason is not None:
                self.unfinished -= 1
                self._on_ended(1)
        elif isinstance(message, Queued):
            self._unqueued -= 1
        else:
            kind = RequestError if message.by_request else WorkerError
            self.fail(kind(message.message))

    def fail(self, error: BaseException) -> None:
        """End it with an error; `wake` follows. The answers that are missing count as ended."""
        if not self.done:
            self._error = error
            self._pieces.clear()
            missing, self.unfinished = self.unfinished, 0
            self._on_ended(missing)

    def wake(self) -> None:
        """Let the reader see what was taken."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def queued(self) -> None:
        """Wait until the engine has found every prompt in order.

        Raises:
            RequestError, WorkerError, Gone: as `news`.
        """
        while self._unqueued > 0 and not self._pieces:
            self._raise()
            await self._wait()
        self._raise()

    async def news(self) -> list[Piece]:
        """What arrived since the last call, at least one piece.

        Raises:
            RequestError: the engine refused a prompt.
            WorkerError: the engine failed, or the server ends.
            Gone: the client went away.
        """
        while not self._pieces:
            self._raise()
            await self._wait()
        pieces, self._pieces = self._pieces, []
        self._tokens_waiting = 0
        return pieces

    def _raise(self) -> None:
        error = self._error
        if isinstance(error, BurnishError):
            raise type(error)(error.what)
        if error is not None:
            raise error

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
