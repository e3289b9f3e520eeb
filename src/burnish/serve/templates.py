"""Chat messages to text, in a process that is killed when the template takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.errors import DataError, WorkerError
from burnish.serve.child import Child


class TemplateRenderer:
    """Renders with one chat template; conversations take turns.

    Args:
        template: Jinja source, the model's own.
        special_tokens: variables such as bos_token.
        source: where the template came from, for messages.
        timeout_s: longest for one conversation, from when the process listens.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], *, source: str, timeout_s: float) -> None:
        self._first = (template, dict(special_tokens), source)
        self._source = source
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._child: Child | None = None
        self._reaping: asyncio.Future[None] | None = None
        self._listens = asyncio.Event()
        self._waiter: asyncio.Future[tuple[str | None, str | None]] | None = None
        self._number = 0

    async def open(self) -> None:
        """Start the process, so that the first conversation need not wait for it.

        Raises:
            WorkerError: it cannot be started.
        """
        async with self._turn:
            await self._started()

    async def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text that the model reads.

        Raises:
            DataError: the template refuses the messages, or takes too long for them.
            WorkerError: its process died, or cannot be started.
        """
        async with self._turn:
            child = await self._started()
            # How long the start takes is no conversation's fault.
            await self._listens.wait()
            if self._child is not child:
                raise _died_error()
            self._number += 1
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            child.send((self._number, list(messages), add_generation_prompt))
            try:
                text, refusal = await asyncio.wait_for(waiter, self._timeout_s)
            except asyncio.TimeoutError:
                await self._end()
                raise DataError(
                    f"the chat template in {self._source} takes too long for these messages",
                    expected=f"at most {self._timeout_s:g} s",
                ) from None
            except BaseException:
                # Whoever asked went away: the answer must not be taken for the next one's.
                await self._end()
                raise
            finally:
                self._waiter = None
        if text is None:
            raise DataError(refusal or "the chat template failed")
        return text

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._end()
            if self._reaping is not None:
                await self._reaping  # of one that died by itself

    async def _started(self) -> Child:
        child = self._child
        if child is None:
            self._listens.clear()
            self._child = child = Child("burnish.serve.template_worker", on_messages=self._take, on_end=self._died)
            try:
                await child.start(self._first)
            except BaseException as error:
                self._child = None
                if isinstance(error, OSError):
                    reason = error.strerror or error
                    raise WorkerError("the chat template's process cannot be started", got=reason) from error
                raise
        return child

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            await child.stop()

    def _take(self, messages: list[Any]) -> None:
        self._listens.set()
        for number, text, refusal in messages:
            if number == self._number and self._waiter is not None and not self._waiter.done():
                self._waiter.set_result((text, refusal))

    def _died(self) -> None:
        child, self._child = self._child, None
        self._listens.set()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(_died_error())
        if child is not None:
            self._reaping = asyncio.ensure_future(child.reap())


def _died_error() -> WorkerError:
    return WorkerError("the chat template's process died")
