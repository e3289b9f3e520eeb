"""Engines that fail in one way each, made in the engine's own process by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from burnish.engine.native import NativeEngine
from burnish.errors import CapacityError, CheckpointError

BASE = "burnish-sql-base"


def plain() -> NativeEngine:
    return NativeEngine(BASE, threads=1)


def slow(seconds: float = 0.02) -> NativeEngine:
    """Every step takes a while, so that what runs is still there when somebody looks."""
    return _with_forward(lambda forward: _late(forward, seconds))


def failing_once(mark: str) -> NativeEngine:
    """One step fails, after the mark is there."""
    return _with_forward(lambda forward: _failing(forward, Path(mark), lambda: RuntimeError("no such tile")))


def dying_once(mark: str) -> NativeEngine:
    """The process dies in a step, after the mark is there."""
    return _with_forward(lambda forward: _failing(forward, Path(mark), lambda: os._exit(7)))


def hanging_once(mark: str) -> NativeEngine:
    """A step never ends, after the mark is there."""
    return _with_forward(lambda forward: _failing(forward, Path(mark), lambda: time.sleep(3600)))


def always_dying() -> NativeEngine:
    """Every step of an answer kills the process."""
    engine = plain()
    engine.warm_up()

    def forward(step: Any, *, greedy: bool) -> Any:
        os._exit(9)

    engine.warm_up = lambda: 0.0  # type: ignore[method-assign]
    engine.runner.backend.forward = forward  # type: ignore[method-assign]
    return engine


def missing() -> NativeEngine:
    raise CheckpointError("there is no such model")


def refused_while(mark: str) -> NativeEngine:
    """It cannot be made as long as the mark is there."""
    if Path(mark).exists():
        raise CapacityError("it does not fit now")
    return plain()


def _with_forward(changed: Any) -> NativeEngine:
    engine = plain()
    engine.warm_up()
    engine.warm_up = lambda: 0.0  # type: ignore[method-assign]
    engine.runner.backend.forward = changed(engine.runner.backend.forward)  # type: ignore[method-assign]
    return engine


def _late(forward: Any, seconds: float) -> Any:
    def late(step: Any, *, greedy: bool) -> Any:
        time.sleep(seconds)
        return forward(step, greedy=greedy)

    return late


def _failing(forward: Any, mark: Path, fail: Any) -> Any:
    def failing(step: Any, *, greedy: bool) -> Any:
        time.sleep(0.01)
        if mark.exists():
            mark.unlink()
            error = fail()
            if error is not None:
                raise error
        return forward(step, greedy=greedy)

    return failing
