"""Several workers on one machine, each a process of its own, started again when one dies. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_POLL_S = 0.1
_CALM_S = 60.0
_LONGEST_PAUSE_S = 30.0
_PR_SET_PDEATHSIG = 1
# What starting again does not mend: usage, does not fit, an extra is missing.
_FINAL_CODES = (2, 3, 6)


@dataclass(kw_only=True)
class _Place:
    """One worker after the other."""

    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = 0.0
    again_at: float = 0.0
    code: int | None = None


@dataclass(kw_only=True)
class Supervisor:
    """Keeps `count` processes of one command line running until each has ended well.

    Args:
        command: what a worker is, without the interpreter: arguments of `python -m burnish`.
        own: variables of one worker alone, by its number from 0.
        say: told in words when a worker died.
    """

    command: Sequence[str]
    count: int
    own: Callable[[int], Mapping[str, str]] = lambda number: {}
    say: Callable[[str], None] = lambda text: None
    _draining: bool = False
    _places: list[_Place] = field(default_factory=list)

    def run(self) -> int:
        """Until all have ended; returns the first exit code that is not 0 of those that were not started again."""
        self._places = [_Place() for _ in range(self.count)]
        try:
            while not all(place.code is not None for place in self._places):
                for number, place in enumerate(self._places, 1):
                    self._look_after(place, number)
                time.sleep(_POLL_S)
        finally:
            self._end_all(signal.SIGKILL)
        return next((place.code for place in self._places if place.code), 0)

    def drain(self) -> None:
        """Let every worker finish what it has begun; none is started again."""
        self._draining = True
        self._end_all(signal.SIGTERM)

    def kill(self) -> None:
        """End every worker at once."""
        self._draining = True
        self._end_all(signal.SIGKILL)

    def _look_after(self, place: _Place, number: int) -> None:
        if place.code is not None:
            return
        now = time.monotonic()
        if place.process is None:
            if self._draining:
                place.code = 0
            elif now >= place.again_at:
                # A session of its own: Ctrl-C reaches it through `drain` alone, and once.
                place.process = subprocess.Popen(
                    [sys.executable, "-m", "burnish", *self.command],
                    env={**os.environ, **self.own(number - 1)},
                    start_new_session=True,
                    preexec_fn=_draining_with(os.getpid()),
                )
                place.started = now
            return
        code = place.process.poll()
        if code is None:
            return
        place.process = None
        if code == 0 or self._draining or code in _FINAL_CODES:
            place.code = 0 if self._draining and code < 0 else code
            return
        # One that ran for a while starts again at once; one that dies at the start is not hurried.
        calm = now - place.started > _CALM_S
        place.pause_s = 0.0 if calm else min(max(1.0, place.pause_s * 2), _LONGEST_PAUSE_S)
        place.again_at = now + place.pause_s
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self.say(f"worker {number} ended {how}; starting it again")

    def _end_all(self, how: signal.Signals) -> None:
        for place in self._places:
            if place.process is not None and place.process.poll() is None:
                place.process.send_signal(how)


def _draining_with(parent: int) -> Callable[[], None] | None:
    """For a child's first moment: have the system drain it when this process is gone, however that ends (Linux)."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)

    return ask


def card_of(number: int, *, visible: str | None, each: int = 1) -> dict[str, str]:
    """The variables by which a worker sees its own cards alone, `each` of them.

    Args:
        visible: CUDA_VISIBLE_DEVICES as it is; None where every card may be used.
    """
    first = number * each
    every = [str(index) for index in range(first + each)] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(every[first : first + each])}
