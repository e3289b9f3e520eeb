"""What one command line did, and the shape of every failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code in (0, 4, 130), self.err
        return json.loads(self.out)

    def fails(self, code: int, *parts: str) -> None:
        """One line on stderr that names every part; nothing of ours fell through to the catch-all."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        for sign in ("Traceback", "BURNISH_TRACEBACK", "Errno"):
            assert sign not in self.err, self.err
        for part in parts:
            assert part in self.err, self.err


Cli = Callable[..., Done]
