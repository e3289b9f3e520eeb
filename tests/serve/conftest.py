"""One server for all tests that leave it as they found it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx")
if any(importlib.util.find_spec(name) is None for name in _NEEDED):
    collect_ignore_glob = ["test_*.py"]  # the extras serve and dev bring them


@pytest.fixture(scope="session")
def server(_own_cache: None) -> Iterator[Any]:
    from serving_process import ServingProcess

    with ServingProcess("--max-queue", "512") as running:
        yield running
