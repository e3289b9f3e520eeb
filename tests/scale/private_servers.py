"""Private servers for tests: those of benchmarks/scale, started once and closed at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "scale"))


def started(kind: str) -> Iterator[Any]:
    """A private server; its absence is a failure where BURNISH_REQUIRE_SERVICES says so, and skips otherwise."""
    import servers

    try:
        server = servers.KINDS[kind]()
    except (servers.MissingServer, ImportError) as error:
        if os.environ.get("BURNISH_REQUIRE_SERVICES"):
            pytest.fail(f"{kind}: {error}")
        pytest.skip(f"{kind}: {error}")
    try:
        yield server
    finally:
        server.close()
