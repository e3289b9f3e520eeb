"""MLflow's server, started once, and a door before it; a tiny model and rows to tune it on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT / "benchmarks" / "track", ROOT / "tests" / "scale"):
    sys.path.insert(0, str(place))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lands in the checkout, and nothing is tracked that a test does not ask for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_RUNS", str(tmp_path / "runs"))
    for name in ("BURNISH_TRACK", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def _started(kind: str) -> Iterator[Any]:
    from private_servers import started

    yield from started(kind)


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[Any]:
    """`mlflow server` over SQLite."""
    import mlflow_server
    import servers

    try:
        server = mlflow_server.MlflowServer()
    except servers.MissingServer as error:
        if os.environ.get("BURNISH_REQUIRE_SERVICES"):
            pytest.fail(f"mlflow: {error}")
        pytest.skip(f"mlflow: {error}")
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def door(mlflow_server: Any) -> Iterator[Any]:
    """A port before the server, which is open."""
    from mlflow_server import Door

    made = Door(mlflow_server.port)
    yield made
    made.close()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Any]:
    yield from _started("mariadb")


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    yield from _started("s3")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import sql_rows, write_json

    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", sql_rows(24))
