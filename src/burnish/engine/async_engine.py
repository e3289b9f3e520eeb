"""Many callers of one event loop (or of several) on one engine, which a thread of its own steps."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from burnish.engine.native import NativeEngine
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt
from burnish.engine.requests import one_answer
from burnish.engine.sampling import SamplingParams
from burnish.errors import WorkerError

_News = StreamEvent | BaseException


@dataclass(eq=False)
class _Caller:
    """Somebody who waits for one request's events."""

    prompt: Prompt
    params: SamplingParams
    adapter: str | None
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[_News] = field(default_factory=asyncio.Queue)
    request_id: int | None = None

    def tell(self, news: _News) -> None:
        """Hand over an event or an error, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:
            return  # The caller's loop is closed: nobody listens any more, and its request was or will be left.


class AsyncEngine:
    """Asynchronous streams over a `NativeEngine`, which nobody else may drive meanwhile.

    Leaving a stream early, or cancelling the task that waits, aborts the request; its blocks are free before the next
    step. An error of a step reaches every caller, and later requests run again.

    Use it as `async with AsyncEngine(engine) as served`, or call `close`.
    """

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self._callers: dict[int, _Caller] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="burnish-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Pieces of one answer as they come; the last event has the output. `adapter` as in `NativeEngine.generate`.

        Raises:
            RequestError: the prompt or its parameters cannot be honoured, or ask for several answers.
            WorkerError: the engine was closed meanwhile.
        """
        async for event in self._events(prompt, one_answer(params), adapter):
            yield event

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> RequestOutput:
        """One finished request; raises as `stream`, but several answers may be asked for."""
        output = None
        async for event in self._events(prompt, params or SamplingParams(), adapter):
            output = event.output
        assert output is not None
        return output

    def stats(self) -> EngineStats:
        """As `NativeEngine.stats`."""
        return self._engine.stats()

    async def add_adapter(self, name: str, folder: str | Path) -> None:
        """As `NativeEngine.add_adapter`; other requests run on before and after."""
        await self._called(lambda: self._engine.add_adapter(name, folder))

    async def remove_adapter(self, name: str) -> None:
        """As `NativeEngine.remove_adapter`."""
        await self._called(lambda: self._engine.remove_adapter(name))

    async def close(self) -> None:
        """Abort what is unfinished and end the thread. Callers that wait get a `WorkerError`; closing twice is well."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def _events(
        self, prompt: Prompt, params: SamplingParams, adapter: str | None
    ) -> AsyncGenerator[StreamEvent, None]:
        caller = _Caller(prompt, params, adapter, asyncio.get_running_loop())
        self._command(lambda: self._submit(caller))
        try:
            while True:
                news = await caller.news.get()
                if isinstance(news, BaseException):
                    raise news
                yield news
                if news.output is not None:
                    return
        finally:
            self._command(lambda: self._leave(caller), wanted=False)

    async def _called(self, work: Callable[[], None]) -> None:
        """Have the thread do this between two steps, and wait for it; raises what it raises."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def command() -> None:
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._command(command)
        await asyncio.wrap_future(done)

    def _command(self, command: Callable[[], None], *, wanted: bool = True) -> None:
        """Have the thread call this before its next step."""
        with self._changed:
            if not self._closing:
                self._commands.append(command)
                self._changed.notify()
            elif wanted:
                raise WorkerError("the engine is closed")

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._closing or not self._engine.scheduler.idle):
                    self._changed.wait()
                commands, self._commands = self._commands, deque()
                closing = self._closing
            for command in commands:
                command()
            if closing:
                self._drop_all(WorkerError("the engine was closed before the request was done"))
                return
            try:
                events = self._engine.step_events()
            except BaseException as error:
                # Whatever it is, somebody waits for it: this thread has nobody else to tell.
                self._drop_all(error)
                continue
            for request_id, event in events:
                caller = self._callers.get(request_id)
                if caller is not None:
                    if event.output is not None:
                        del self._callers[request_id]
                    caller.tell(event)

    def _submit(self, caller: _Caller) -> None:
        try:
            caller.request_id = self._engine.submit(caller.prompt, caller.params, adapter=caller.adapter)
        except BaseException as error:
            caller.tell(error)
        else:
            self._callers[caller.request_id] = caller

    def _leave(self, caller: _Caller) -> None:
        if caller.request_id is not None and self._callers.pop(caller.request_id, None) is not None:
            self._engine.abort(caller.request_id)

    def _drop_all(self, error: BaseException) -> None:
        callers, self._callers = list(self._callers.values()), {}
        for caller in callers:
            assert caller.request_id is not None
            self._engine.abort(caller.request_id)
            caller.tell(error)
