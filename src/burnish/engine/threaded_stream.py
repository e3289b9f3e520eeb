"""Streaming one request from a library that runs a whole batch to its end in one call."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator

from burnish.engine.outputs import StreamEvent
from burnish.engine.request import Request
from burnish.engine.sequence import Sequence

OnToken = Callable[[Sequence], None]
RunBatch = Callable[[list[Sequence], OnToken], None]


def stream_in_thread(sequence: Sequence, run_batch: RunBatch, *, name: str) -> Generator[StreamEvent, None, None]:
    """Run the request in a thread of its own, and hand its pieces over as they come. Closing aborts it.

    Args:
        run_batch: runs sequences to their end, calling what it is given after each token.
        name: of the thread.
    """
    events: queue.SimpleQueue[StreamEvent | BaseException] = queue.SimpleQueue()
    closed = threading.Event()
    request = Request(sequences=[sequence])

    def on_token(grown: Sequence) -> None:
        if closed.is_set() and not grown.finished:
            grown.finish("aborted", now_s=time.perf_counter())
        event = request.event()
        if event is not None:
            events.put(event)

    def run() -> None:
        try:
            run_batch([sequence], on_token)
        except BaseException as error:  # handed to the caller's thread, which raises it
            events.put(error)

    sequence.arrival_s = time.perf_counter()
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.output is not None:
                return
    finally:
        closed.set()
        thread.join()
