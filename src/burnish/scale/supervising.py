"""Several workers on one machine, each a process of its own, started again when one dies. Torch-free."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_POLL_S = 0.1
_CALM_S = 60.0
_LONGEST_PAUSE_S = 30.0
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
        say: told in words when a worker died.
    """

    command: Sequence[str]
    count: int
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
                command = [sys.executable, "-m", "burnish", *self.command]
                place.process = subprocess.Popen(command, start_new_session=True)
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
