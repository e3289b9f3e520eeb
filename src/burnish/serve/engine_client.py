"""The server's side of its engine: starts the process, keeps it alive, hands requests over and their news out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from burnish import errors
from burnish.engine.outputs import EngineStats
from burnish.engine.prompts import EncodedPrompt
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, WorkerError
from burnish.serve.child import Child
from burnish.serve.messages import Abort, Ready, Refused, Start, Stats, Submit
from burnish.serve.tickets import Ticket

EngineState = Literal["starting", "ready", "restarting", "broken", "stopped"]

_WATCH_EVERY_S = 0.5
_RESTARTS_WITHIN_S = 600.0
_MAX_BACK_OFF_S = 30.0


class EngineClient:
    """One engine in a process of its own, started anew when it dies, hangs or gives up.

    Everything happens in one event loop. News cross once per step, for all streams together.

    Args:
        make: see `Start`.
        interval_s: see `ServeSettings.stream_interval_s`.
        engine_timeout_s, max_restarts: see `ServeSettings`.
        say: told in one line what happens to the engine.

    Attributes:
        state: "starting" until the engine answers for the first time, "broken" when it was given up.
        stats: the last reading of the engine's load; None before the first.
        error: why the engine is broken.
        restarts: how often it was started anew.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        interval_s: float,
        engine_timeout_s: float,
        max_restarts: int,
        say: Callable[[str], None],
    ) -> None:
        self.state: EngineState = "starting"
        self.stats: EngineStats | None = None
        self.error: BurnishError | None = None
        self.restarts = 0
        self._start = Start(make=make, interval_s=interval_s)
        self._timeout_s = engine_timeout_s
        self._max_restarts = max_restarts
        self._say = say
        self._child: Child | None = None
        self._tickets: dict[int, Ticket] = {}
        self._next_number = 1
        self._heard_s = 0.0
        self._failed_s: deque[float] = deque()
        self._ended = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._before: dict[str, int] = {}
        self._refused: BurnishError | None = None
        self._was_ready = False

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return None if self._child is None else self._child.pid

    def counted(self, name: str) -> int:
        """A counter of `EngineStats` over all engines so far."""
        stats = self.stats  # read once: other threads ask as well
        return self._before.get(name, 0) + (0 if stats is None else getattr(stats, name))

    def open(self) -> None:
        """Start the engine in the background; `settled` waits for it."""
        self._task = asyncio.create_task(self._keep_alive(), name="burnish-engine")

    async def settled(self) -> None:
        """Wait until the engine is ready.

        Raises:
            BurnishError: it cannot be made; the error that making it raised.
        """
        while self.state not in ("ready", "broken", "stopped"):
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None:
            raise self.error

    async def broken(self) -> BurnishError:
        """Wait until the engine is given up; returns why."""
        while self.error is None:
            self._changed.clear()
            await self._changed.wait()
        return self.error

    def submit(
        self,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        *,
        adapter: str | None,
        on_ended: Callable[[int], None],
    ) -> Ticket:
        """Hand over the prompts of one HTTP request; `Ticket` says what `on_ended` is.

        Raises:
            WorkerError: there is no engine at this moment.
        """
        if self.state != "ready" or self._child is None:
            raise WorkerError("the engine is not ready")
        if not self._tickets:
            self._heard_s = time.monotonic()
        ticket = Ticket(self._next_number, count=len(prompts), choices=params.n, on_ended=on_ended)
        self._next_number += len(prompts)
        for number, prompt in zip(ticket.numbers, prompts):
            self._tickets[number] = ticket
            self._child.send(Submit(number, prompt, params, adapter))
        return ticket

    def leave(self, ticket: Ticket, error: BaseException) -> None:
        """Stop following a ticket, for this reason; what it still runs is aborted before the engine's next step."""
        ticket.fail(error)
        ticket.wake()
        self._forget(ticket)

    def fail_all(self, error: BaseException) -> None:
        """Leave every ticket for this reason."""
        for ticket in dict.fromkeys(self._tickets.values()):
            self.leave(ticket, error)

    async def close(self) -> None:
        """End the engine's process; tickets fail."""
        self._set("stopped")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.fail_all(WorkerError("the server is shutting down"))
        if self._child is not None:
            await self._child.stop()
            self._child = None

    def _forget(self, ticket: Ticket) -> None:
        """Follow a ticket no longer; of one that failed, what still runs is aborted."""
        for number in ticket.numbers:
            if self._tickets.pop(number, None) is not None and ticket.failed and self._child is not None:
                self._child.send(Abort(number))

    def _set(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()

    async def _keep_alive(self) -> None:
        while True:
            self._ended.clear()
            self._heard_s = time.monotonic()
            why = ""
            child = self._child = Child("burnish.serve.worker", on_messages=self._take, on_end=self._ended.set)
            try:
                await child.start(self._start)
                await self._watch(child)
            except OSError as error:
                why = f"could not be started ({error.strerror or error})"
            if self.state == "ready":
                self._set("restarting")
            self.fail_all(WorkerError("the engine failed and is being restarted; try again"))
            await child.reap()
            self._child = None
            self._count_before()
            refused, self._refused = self._refused, None
            if refused is not None and not self._was_ready:
                self.error = refused
            elif refused is not None:
                # What could be made once is tried again: memory that is short now may be free in a moment.
                why = f"could not be made again ({refused.message})"
            why = why or _why(child.exit_code)
            wait_s = self._until_next(why)
            if self.error is not None:
                self._set("broken")
                return
            self._set("restarting")
            self.restarts += 1
            self._say(f"the engine {why}; it is started anew in {wait_s:g} s")
            await asyncio.sleep(wait_s)

    def _until_next(self, why: str) -> float:
        """Count a failure; returns seconds to wait before the next start, or sets `error` where there is none."""
        now_s = time.monotonic()
        self._failed_s.append(now_s)
        while now_s - self._failed_s[0] > _RESTARTS_WITHIN_S:
            self._failed_s.popleft()
        if self.error is None and len(self._failed_s) > self._max_restarts:
            self.error = WorkerError(
                f"the engine {why} {len(self._failed_s)} times within ten minutes",
                remedy="Run it with BURNISH_TRACEBACK=1 to see where.",
            )
        return min(_MAX_BACK_OFF_S, 0.1 * 4 ** (len(self._failed_s) - 1))

    async def _watch(self, child: Child) -> None:
        """Wait for the process to end; one that has work and says nothing for too long is killed."""
        while not self._ended.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _WATCH_EVERY_S)
            silent_s = time.monotonic() - self._heard_s
            if self.state == "ready" and self._tickets and silent_s > self._timeout_s and not self._ended.is_set():
                self._say(f"the engine gave no sign for {silent_s:.0f} s and is killed")
                child.kill()
                await self._ended.wait()

    def _take(self, messages: list[Any]) -> None:
        """Everything that one step has to say, for all streams."""
        self._heard_s = time.monotonic()
        touched: dict[Ticket, None] = {}
        for batch in messages:
            for message in batch:
                if isinstance(message, Stats):
                    self.stats = message.stats
                elif isinstance(message, Ready):
                    self.stats = message.stats
                    self._was_ready = True
                    self._set("ready")
                elif isinstance(message, Refused):
                    kind = getattr(errors, message.kind, WorkerError)
                    self._refused = kind(message.message)
                else:
                    ticket = self._tickets.get(message.number)
                    if ticket is not None:
                        ticket.take(message)
                        touched[ticket] = None
        for ticket in touched:
            if ticket.done:
                self._forget(ticket)
            ticket.wake()

    def _count_before(self) -> None:
        if self.stats is not None:
            for name in ("preemptions", "prefix_hit_tokens", "steps", "prompt_tokens", "output_tokens"):
                self._before[name] = self.counted(name)
            self.stats = None


def _why(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by signal {-exit_code}"
    return f"ended with code {exit_code}"
