"""The engine's process: `python -m burnish.serve.worker DESCRIPTOR`. It ends when its socket closes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from typing import Any

from burnish.errors import BurnishError
from burnish.serve.channel import Line, take_line
from burnish.serve.messages import Ready, Refused, Start


def main() -> int:
    line = take_line()
    # The event loop of the reading thread must not wait long for the one that steps, nor the other way round.
    sys.setswitchinterval(0.001)
    try:
        start = line.receive()
        assert isinstance(start, Start)
        from burnish.serve.engine_loop import EngineLoop

        engine = start.make()
        engine.warm_up()
        loop = EngineLoop(engine, send=line.send, interval_s=start.interval_s)
        line.send([Ready(engine.stats())])
    except (EOFError, BrokenPipeError):
        return 0
    except BaseException as error:
        _explain()
        with contextlib.suppress(OSError):  # the server may have ended meanwhile
            line.send([_refusal(error)])
        return 1
    threading.Thread(target=_read, args=(line, loop), name="burnish-read", daemon=True).start()
    try:
        loop.run()
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except BaseException:
        _explain()
        return 1
    return 0


def _read(line: Line, loop: Any) -> None:
    try:
        while True:
            loop.take(line.receive())
    except EOFError:
        loop.close()
        # A step may take long, and nobody is left who would want its tokens.
        os._exit(0)


def _refusal(error: BaseException) -> Refused:
    if isinstance(error, BurnishError):
        return Refused(type(error).__name__, error.message)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return Refused("OutOfMemoryError", "ran out of memory while loading the model")
    return Refused("WorkerError", f"the engine could not be started: {type(error).__name__}: {text}")


def _explain() -> None:
    if os.environ.get("BURNISH_TRACEBACK"):
        traceback.print_exc()


if __name__ == "__main__":
    code = main()
    # Threads that compile a grammar cannot be stopped; they must not keep the process.
    sys.stderr.flush()
    os._exit(code)
