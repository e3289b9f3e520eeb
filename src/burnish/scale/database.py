"""One SQL database, reached again whenever it comes back: transactions that are repeated while the reason may pass.

Work handed to `read` and `write` may run more than once, so it has to be repeatable: every statement of this room is.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy import event, exc
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import URL, Connection, make_url

from burnish._optional import require
from burnish.errors import BurnishError, ConfigError
from burnish.scale.tables import metadata

T = TypeVar("T")

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}
EXPECTED_URL = "sqlite:///FILE, mysql://USER:PASSWORD@HOST/DATABASE or postgresql://USER:PASSWORD@HOST/DATABASE"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
# Connections that are lost are mended, not told.
logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
# Words of errors that no waiting mends: a wrong password, a missing database, a folder that is not there. An unknown
# host and a missing socket are not among them: a service that is started again has neither meanwhile.
_PERMANENT = {
    "sqlite": (
        "no such",
        "has no column",
        "unable to open database file",
        "not a database",
        "readonly database",
        "malformed",
        "disk is full",
        "disk full",
        "syntax",
    ),
    "postgresql": (
        "authentication failed",
        "does not exist",
        "no password supplied",
        "no pg_hba.conf entry",
        "permission denied",
        "invalid connection option",
        "syntax",
    ),
}
# MySQL: too many connections, a table that somebody else made meanwhile, shutting down, lock wait timeout, deadlock,
# killed, read-only while it restarts, lost.
_PASSING_MYSQL = {1040, 1050, 1053, 1205, 1213, 1317, 1290, 1792, 1927, 2002, 2003, 2006, 2013, 2014, 2055}
# A server that hangs, or a network that swallows packets, is noticed: MySQL's answers are not waited for without end,
# and PostgreSQL is asked whether it is still there. Locks are waited for less long.
_WAITS: dict[str, dict[str, int]] = {
    "mysql": {"read_timeout": 600, "write_timeout": 600},
    "postgresql": {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 6, "tcp_user_timeout": 90_000},
}


class Database:
    """A pool of connections, made at the first use. Safe to use from several threads.

    Args:
        url: see `EXPECTED_URL`; a bare file name is SQLite's.
        patience_s: how long a transaction is repeated while the database is away, busy or deadlocked.

    Raises:
        ConfigError: the URL is malformed, or names a database that is not supported.
        MissingExtraError: its driver is not installed.
    """

    def __init__(self, url: str, *, patience_s: float) -> None:
        self.url = parse_url(url)
        self.kind = {"postgres": "postgresql", "mariadb": "mysql"}.get(
            self.url.get_backend_name(), self.url.get_backend_name()
        )
        self.patience_s = patience_s
        self._stopped = threading.Event()
        self._engine = self._connectable()
        self._clock_offset_s = 0.0

    def __str__(self) -> str:
        return self.url.set(drivername=self.url.get_backend_name()).render_as_string(hide_password=True)

    def open(self) -> None:
        """Make the tables that are missing, and compare clocks.

        Raises:
            BurnishError: the database cannot be reached.
            ConfigError: it refuses us.
        """
        try:
            self._repeated(lambda: metadata.create_all(self._engine), why="the tables cannot be made")
        except (TypeError, ValueError, OverflowError, RuntimeError, ImportError) as error:
            # What a driver raises of options that it does not know, and of packages that it lacks.
            raise ConfigError(f"{self}: it cannot be connected to", got=error, expected=EXPECTED_URL) from error
        query = {
            "mysql": "SELECT UNIX_TIMESTAMP(NOW(6))",
            "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
        }.get(self.kind)
        if query is not None:
            asked = time.time()
            told = float(self.read(lambda connection: connection.execute(sql.text(query)).scalar_one()))
            self._clock_offset_s = told - (asked + time.time()) / 2

    def now_s(self) -> float:
        """Seconds since 1970 by the database's clock, which all workers share."""
        return time.time() + self._clock_offset_s

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that changes nothing. Raises as `write`."""
        return self._repeated(lambda: self._once(work, writing=False), why="the database does not answer")

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction, again if the database went away or another transaction was in the way.

        Raises:
            BurnishError: it stayed so for `patience_s`, or `stop` was called.
            ConfigError: the database refuses what no waiting will change.
        """
        return self._repeated(lambda: self._once(work, writing=True), why="the database cannot be written to")

    def insert_new(self, table: sql.Table) -> Any:
        """An INSERT into `table` that leaves rows alone whose primary key is there already."""
        if self.kind == "mysql":
            statement = mysql.insert(table)
            first = next(iter(table.primary_key.columns))
            return statement.on_duplicate_key_update({first.name: first})
        make = sqlite.insert if self.kind == "sqlite" else postgresql.insert
        return make(table).on_conflict_do_nothing()

    def stop(self) -> None:
        """Wait no longer for a database that is away: transactions fail at once from now on if it is."""
        self._stopped.set()

    def close(self) -> None:
        self._engine.dispose()

    def _once(self, work: Callable[[Connection], T], *, writing: bool) -> T:
        with self._engine.connect().execution_options(burnish_writing=writing) as connection, connection.begin():
            return work(connection)

    def _repeated(self, call: Callable[[], T], *, why: str) -> T:
        ends_s = time.monotonic() + self.patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except exc.DBAPIError as error:
                said = " ".join(str(error.orig).split())
                if not _may_pass(error, self.kind):
                    raise ConfigError(f"{self}: {why}", got=said) from error
                left_s = ends_s - time.monotonic()
                if left_s <= 0 or self._stopped.is_set():
                    raise BurnishError(
                        f"{self}: {why}", got=said, remedy="Is it running, and the URL right?"
                    ) from error
            except exc.TimeoutError as error:  # of the pool: every connection is held by a thread that waits
                if time.monotonic() > ends_s or self._stopped.is_set():
                    raise BurnishError(f"{self}: {why}", got=error) from error
            # Spread out, or workers that collided would collide again.
            self._stopped.wait(min(pause_s * random.uniform(0.5, 1.5), max(0.0, ends_s - time.monotonic())))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _connectable(self) -> sql.Engine:
        options: dict[str, Any] = {"pool_recycle": 1800, "hide_parameters": True}
        if self.kind == "sqlite":
            options["connect_args"] = {"timeout": 30.0}
        else:
            # Rows that others read stay unlocked, so that workers do not wait for each other.
            options |= {"isolation_level": "READ COMMITTED", "pool_size": 8, "pool_timeout": 30}
            waits = {"connect_timeout": 10, **_WAITS[self.kind]}
            options["connect_args"] = {name: value for name, value in waits.items() if name not in self.url.query}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", exc.SAWarning)  # of options that would be ignored
                engine = sql.create_engine(self.url, **options)
        except (TypeError, ValueError, exc.SAWarning) as error:
            raise ConfigError(f"{self}: it has an option that is not usable", got=error) from error
        if self.kind == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        return engine


def parse_url(text: str) -> URL:
    """The URL of a database with the driver we use for it.

    Raises:
        ConfigError: it is malformed, or the database is not supported.
        MissingExtraError: its driver is not installed.
    """
    if "://" not in text:
        if not text or text.endswith("/"):
            raise ConfigError("--store is malformed", got=repr(text), expected=EXPECTED_URL)
        text = f"sqlite:///{text}"
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError) as error:
        raise ConfigError("--store is malformed", expected=EXPECTED_URL) from error
    name = url.drivername.partition("+")[0]
    usable = name in DRIVERS and url.database not in (None, "", ":memory:")
    if not usable or not 0 < (1 if url.port is None else url.port) < 65536:
        got = url.render_as_string(hide_password=True)
        raise ConfigError("--store names no database that is supported", got=got, expected=EXPECTED_URL)
    module = {"mysql": "pymysql", "mariadb": "pymysql", "postgresql": "psycopg", "postgres": "psycopg"}.get(name)
    if module is not None:
        require(module, extra="queue")
    if module == "pymysql" and "charset" not in url.query:
        url = url.update_query_dict({"charset": "utf8mb4"})
    return url.set(drivername=DRIVERS[name])


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's BEGIN is ours, below
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins by reading and then writes may not wait for its turn; one that says so at once may.
    writing = connection.get_execution_options().get("burnish_writing", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _may_pass(error: exc.DBAPIError, kind: str) -> bool:
    """Whether waiting may help: the server is down or starting, or another transaction was in the way."""
    cause: Any = error.orig
    if kind == "mysql":
        code = cause.args[0] if getattr(cause, "args", None) else None
        return error.connection_invalidated or code in _PASSING_MYSQL or code == 0
    said = str(cause).lower()
    if any(words in said for words in _PERMANENT[kind]):
        return False
    if kind == "postgresql" and not isinstance(error, (exc.OperationalError, exc.InterfaceError)):
        # Serialization failure, deadlock, a table that somebody else made meanwhile (both), shutting down or starting.
        state = getattr(cause, "sqlstate", None) or ""
        passing = state in ("40001", "40P01", "42P07", "23505")
        return error.connection_invalidated or passing or state.startswith(("57P", "08"))
    return isinstance(error, (exc.OperationalError, exc.InterfaceError))
