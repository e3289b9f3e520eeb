"""The loop of the engine's process: requests in, pieces of answers out, one batch after another."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from burnish.engine.request import Request
from burnish.engine.sequence import Sequence
from burnish.errors import BurnishError, WorkerError
from burnish.serve.messages import Abort, Failed, Piece, Queued, Stats, Submit

if TYPE_CHECKING:
    from burnish.engine.native import NativeEngine

_STATS_EVERY_S = 0.25
_MAX_FAILURES = 3
_PREPARING = 2


@dataclass(eq=False)
class _Followed:
    """A request whose answers are sent on as they grow."""

    number: int
    request: Request
    shown: list[int]
    ended: list[bool]
    sent_s: float = 0.0


@dataclass(eq=False)
class EngineLoop:
    """Runs one engine for one server.

    Args:
        send: hands a list of messages to the server; called by the thread of `run` alone.
        interval_s: see `ServeSettings.stream_interval_s`.
    """

    engine: NativeEngine
    send: Callable[[list[Any]], None]
    interval_s: float
    _inbox: deque[Any] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _followed: dict[int, _Followed] = field(default_factory=dict)
    _left: set[int] = field(default_factory=set)
    _preparing: set[int] = field(default_factory=set)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._by_request: dict[Request, _Followed] = {}
        # Compiling a grammar may take seconds, in which the others' steps go on.
        self._pool = ThreadPoolExecutor(_PREPARING, thread_name_prefix="burnish-prepare")
        self._stats_s = 0.0
        self._failures = 0

    def take(self, message: Submit | Abort) -> None:
        """Accept a message, from any one thread."""
        if isinstance(message, Abort):
            self._put(message)
            return
        with self._changed:
            self._preparing.add(message.number)
        if message.params.constraint is not None:
            self._pool.submit(self._prepare, message)
        else:
            self._prepare(message)

    def close(self) -> None:
        """Make `run` return after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Serve until closed.

        Raises:
            Exception: steps failed again and again; a new process has a better chance.
        """
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self._closed or not self.engine.scheduler.idle):
                        self._changed.wait()
                    inbox, self._inbox = self._inbox, deque()
                if self._closed:
                    return
                news: list[Any] = []
                for message in inbox:
                    self._handle(message, news)
                self._step(news)
                now_s = time.monotonic()
                if self.engine.scheduler.idle or now_s - self._stats_s >= _STATS_EVERY_S:
                    self._stats_s = now_s
                    news.append(Stats(self.engine.stats()))
                if news:
                    self.send(news)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, message: Any) -> None:
        with self._changed:
            self._inbox.append(message)
            self._changed.notify()

    def _prepare(self, message: Submit) -> None:
        try:
            prepared = self.engine.prepare(message.prompt, message.params, adapter=message.adapter)
        except BurnishError as error:
            self._put(Failed(message.number, error.message, True))
        except BaseException as error:
            self._put(Failed(message.number, _line(error), False))
        else:
            self._put((message.number, prepared))

    def _handle(self, message: Any, news: list[Any]) -> None:
        if isinstance(message, Abort):
            if message.number in self._preparing:
                self._left.add(message.number)
                return
            followed = self._followed.get(message.number)
            if followed is not None:
                self._forget(followed)
                self.engine.abort(followed.request.request_id)
            return
        number = message.number if isinstance(message, Failed) else message[0]
        self._preparing.discard(number)
        if number in self._left:
            self._left.discard(number)
        elif isinstance(message, Failed):
            news.append(message)
        else:
            request: Request = message[1]
            count = len(request.sequences)
            followed = _Followed(number, request, [0] * count, [False] * count)
            self._followed[number] = self._by_request[request] = followed
            self.engine.enqueue(request)
            news.append(Queued(number))

    def _forget(self, followed: _Followed) -> None:
        self._followed.pop(followed.number, None)
        self._by_request.pop(followed.request, None)

    def _step(self, news: list[Any]) -> None:
        try:
            advanced = self.engine.advance()
        except Exception as error:
            # Without its other processes an engine never runs again.
            self._failures = _MAX_FAILURES if isinstance(error, WorkerError) else self._failures + 1
            for followed in list(self._followed.values()):
                self._forget(followed)
                self.engine.abort(followed.request.request_id)
                news.append(Failed(followed.number, f"the engine failed: {_line(error)}", False))
            if self._failures >= _MAX_FAILURES:
                self.send(news)
                raise
            return
        if advanced:
            self._failures = 0
        now_s = time.monotonic()
        for request in advanced:
            followed = self._by_request.get(request)
            if followed is None:
                continue
            if request.finished:
                self._forget(followed)
            elif now_s - followed.sent_s < self.interval_s and not _has_ended(followed):
                continue
            followed.sent_s = now_s
            self._tell(followed, news)

    def _tell(self, followed: _Followed, news: list[Any]) -> None:
        for choice, sequence in enumerate(followed.request.sequences):
            if followed.ended[choice]:
                continue
            start = followed.shown[choice]
            text = sequence.text.take()
            token_ids = tuple(sequence.token_ids[start:])
            ended = sequence.finished
            if not (text or token_ids or ended):
                continue
            followed.shown[choice] += len(token_ids)
            followed.ended[choice] = ended
            scored = sequence.prompt_logprobs
            news.append(
                Piece(
                    followed.number,
                    choice,
                    text,
                    token_ids,
                    None if sequence.params.logprobs is None else tuple(sequence.logprobs[start:][: len(token_ids)]),
                    sequence.finish_reason,
                    sequence.error,
                    scored.result() if scored is not None and start == 0 else None,
                    _decode_s(sequence) if ended else 0.0,
                    self._kv_bytes(sequence) if ended else 0,
                )
            )

    def _kv_bytes(self, sequence: Sequence) -> int:
        """What a sequence that ended held at its most; the last token is never computed."""
        scheduler = self.engine.scheduler
        if scheduler.blocks is None:
            return 0
        chunk = min(len(sequence.prompt_ids), scheduler.max_batch_tokens)
        return scheduler.block_bytes * scheduler.blocks.most_blocks(sequence.num_tokens - 1, chunk=chunk)


def _has_ended(followed: _Followed) -> bool:
    """One of several answers is done, and nobody was told."""
    sequences = followed.request.sequences
    return len(sequences) > 1 and any(one.finished and not ended for one, ended in zip(sequences, followed.ended))


def _decode_s(sequence: Sequence) -> float:
    times_s = sequence.token_times_s
    return times_s[-1] - times_s[0] if len(times_s) > 1 else 0.0


def _line(error: BaseException) -> str:
    return (
        error.message if isinstance(error, BurnishError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    )
