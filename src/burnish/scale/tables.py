"""The tables behind the job queue, the same on SQLite, MySQL/MariaDB and PostgreSQL.

A job has items, an item has at most one result: the primary key of `results` is (job_id, item_id), and the first row
wins. JSON is kept as text, times are seconds since 1970 by the database's clock.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql

# Names are compared byte by byte everywhere; MySQL would otherwise hold "A" and "a" to be the same job.
_NAME = String(96).with_variant(mysql.VARCHAR(96, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
_LONG = Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
_TITLE = String(255).with_variant(mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")

PENDING, RUNNING, DONE, ERROR, DEAD = STATES = ("pending", "running", "done", "error", "dead")
FINISHED = (DONE, ERROR)

metadata = MetaData()

jobs = Table(
    "burnish_jobs",
    metadata,
    Column("job_id", _NAME, primary_key=True),
    Column("queue", _NAME, nullable=False),
    Column("source", _TITLE, nullable=False),
    Column("digest", _NAME, nullable=False),
    Column("params", _LONG, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("num_items", BigInteger, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("submitted_s", Double, nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)

items = Table(
    "burnish_items",
    metadata,
    Column("job_id", _NAME, primary_key=True),
    Column("item_id", BigInteger, primary_key=True, autoincrement=False),
    Column("queue", _NAME, nullable=False),
    Column("priority_rank", Integer, nullable=False),
    Column("submitted_s", Double, nullable=False),
    Column("name", _TITLE),
    Column("prompt", _LONG, nullable=False),
    Column("params", _LONG),
    Column("state", _NAME, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("token", _NAME),
    Column("worker", _NAME),
    Column("lease_until_s", Double),
    Column("published", Boolean, nullable=False),
    Index("burnish_items_next", "queue", "state", "priority_rank", "submitted_s", "item_id"),
    Index("burnish_items_leases", "queue", "state", "lease_until_s"),
    Index("burnish_items_states", "job_id", "state"),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)

results = Table(
    "burnish_results",
    metadata,
    Column("job_id", _NAME, primary_key=True),
    Column("item_id", BigInteger, primary_key=True, autoincrement=False),
    Column("error", _LONG),
    Column("answer", _LONG),
    Column("prompt_tokens", Integer),
    Column("output_tokens", Integer),
    Column("model", _TITLE, nullable=False),
    Column("worker", _NAME, nullable=False),
    Column("finished_s", Double, nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)

workers = Table(
    "burnish_workers",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("queue", _NAME, nullable=False),
    Column("model", _TITLE, nullable=False),
    Column("host", _TITLE, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", _NAME, nullable=False),
    Column("running", Integer, nullable=False),
    Column("finished", BigInteger, nullable=False),
    Column("started_s", Double, nullable=False),
    Column("seen_s", Double, nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)
