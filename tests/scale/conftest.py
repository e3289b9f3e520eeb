"""Queues over SQLite and over real servers, which start when a test first asks for them and end with the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from private_servers import started

from burnish.scale.database import Database
from burnish.scale.opening import QueueAddress
from burnish.scale.store import JobStore


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[Any]:
    yield from started("rabbitmq")


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Any]:
    yield from started("mariadb")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    yield from started("postgresql")


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    yield from started("s3")


@pytest.fixture
def address(tmp_path: Path) -> QueueAddress:
    """A queue in a fresh SQLite file."""
    return QueueAddress(store=f"sqlite:///{tmp_path / 'queue.db'}")


@pytest.fixture
def store(address: QueueAddress) -> Iterator[JobStore]:
    database = Database(address.store, patience_s=300.0)
    database.open()
    yield JobStore(database)
    database.close()


@pytest.fixture(params=["sqlite", "mariadb", "postgresql"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobStore]:
    """An empty store of every kind."""
    from burnish.scale.tables import metadata

    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'any.db'}"
    else:
        url = request.getfixturevalue(request.param).url
    database = Database(url, patience_s=300.0)
    database.open()
    database.write(lambda connection: [connection.execute(table.delete()) for table in metadata.sorted_tables])
    yield JobStore(database)
    database.close()
