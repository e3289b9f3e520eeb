"""Tables, their columns and their rows: parsing the worlds and drawing one database from a world."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Protocol

_COLUMN = re.compile(r"(?P<name>[a-z_]+)(?P<mark>[:=#.@])(?P<rest>.+)")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a world's table.

    kind is "person", "place", "org", "title", "code", "choice", "int", "real", "year" or "date".
    """

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def phrase(self) -> str:
        """The column as people say it."""
        return self.name.replace("_", " ")

    @property
    def phrase_with_article(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.phrase}"

    @property
    def counts_things(self) -> bool:
        """Whether the column is a number of something, such as runways or beds."""
        return self.kind == "int" and self.name.endswith("s") and not self.name.endswith("ss")

    @property
    def sql_type(self) -> str:
        return {"int": "INTEGER", "year": "INTEGER", "real": "REAL"}.get(self.kind, "TEXT")

    @property
    def is_number(self) -> bool:
        return self.kind in ("int", "real", "year")

    @property
    def is_measure(self) -> bool:
        """Whether sums and averages of the column mean something."""
        return self.kind in ("int", "real")

    @property
    def is_text(self) -> bool:
        return self.kind in ("person", "place", "org", "title", "choice")


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """A table as a world defines it, before columns are chosen and rows are drawn."""

    name: str
    parent: str | None
    columns: tuple[Column, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its chosen columns; rows hold id, the columns in order, and the parent's id if there is a parent."""

    name: str
    columns: tuple[Column, ...]
    parent: Table | None = None
    rows: tuple[tuple[str | int | float, ...], ...] = ()

    @property
    def plural(self) -> str:
        return pluralize(self.name)

    @property
    def foreign_key(self) -> str:
        assert self.parent is not None
        return f"{self.parent.name}_id"

    @property
    def column_names(self) -> list[str]:
        names = ["id", *(column.name for column in self.columns)]
        return [*names, self.foreign_key] if self.parent else names

    def values(self, column: Column) -> list[str | int | float]:
        index = 1 + self.columns.index(column)
        return [row[index] for row in self.rows]

    def create_statement(self) -> str:
        parts = ["id INTEGER", *(f"{column.name} {column.sql_type}" for column in self.columns)]
        if self.parent:
            parts.append(f"{self.foreign_key} INTEGER")
        return f"CREATE TABLE {self.name} ({', '.join(parts)});"

    def insert_statements(self) -> list[str]:
        return [
            f"INSERT INTO {self.name} VALUES ({', '.join(sql_literal(value) for value in row)});" for row in self.rows
        ]


@dataclass(frozen=True, kw_only=True)
class Database:
    """One or two related tables with rows."""

    tables: tuple[Table, ...]

    @property
    def schema(self) -> str:
        return "\n".join(table.create_statement() for table in self.tables)

    @property
    def script(self) -> str:
        lines: list[str] = []
        for table in self.tables:
            lines.append(table.create_statement())
            lines.extend(table.insert_statements())
        return "\n".join(lines)


class Words(Protocol):
    """Where text values come from."""

    def draw(self, kind: str, rng: random.Random) -> str:
        """One value of kind person, place, org, title or code."""
        ...


@dataclass(frozen=True)
class WordLists:
    """Values made from a split's word lists."""

    lists: dict[str, str]
    _split: dict[str, list[str]] = field(default_factory=dict)

    def _words(self, key: str) -> list[str]:
        if key not in self._split:
            text = self.lists[key]
            self._split[key] = text.split("|") if "|" in text else text.split()
        return self._split[key]

    def draw(self, kind: str, rng: random.Random) -> str:
        if kind == "person":
            return f"{rng.choice(self._words('first'))} {rng.choice(self._words('last'))}"
        if kind == "title":
            return f"{rng.choice(self._words('adjective'))} {rng.choice(self._words('noun'))}"
        if kind == "code":
            return draw_code(rng)
        return rng.choice(self._words(kind))


def draw_code(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXZ") for _ in range(2)) + str(rng.randint(10, 999))


def pluralize(noun: str) -> str:
    """The plural of a table's name in words."""
    words = noun.replace("_", " ")
    if words in ("fish", "aircraft", "staff"):
        return words
    if words.endswith("person"):
        return words[:-6] + "people"
    if re.search(r"[^aeiou]y$", words):
        return words[:-1] + "ies"
    return words + "es" if re.search(r"(s|x|ch|sh)$", words) else words + "s"


def sql_literal(value: str | int | float) -> str:
    """A value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def parse_column(text: str) -> Column:
    """Read one column of a world; see `domains` for the notation."""
    match = _COLUMN.fullmatch(text.strip())
    assert match, f"not a column: {text!r}"
    name, mark, rest = match["name"], match["mark"], match["rest"]
    if mark == ":":
        return Column(name=name, kind=rest)
    if mark == "=":
        return Column(name=name, kind="choice", choices=tuple(rest.split("|")))
    if rest == "date":
        return Column(name=name, kind="date", low=1995, high=2023)
    low, high = (int(part) for part in rest.split("-"))
    return Column(name=name, kind={"#": "int", ".": "real", "@": "year"}[mark], low=low, high=high)


def parse_worlds(text: str) -> list[list[TableKind]]:
    """Read worlds; a blank line separates them, and a world's first table is the parent of the others."""
    worlds: list[list[TableKind]] = []
    for block in text.strip().split("\n\n"):
        tables = []
        for line in block.splitlines():
            head, _, body = line.partition(":")
            name, _, parent = head.strip().partition(">")
            columns = tuple(parse_column(part) for part in body.split(","))
            tables.append(TableKind(name=name, parent=parent or None, columns=columns))
        worlds.append(tables)
    return worlds


def draw_value(column: Column, words: Words, rng: random.Random) -> str | int | float:
    """One cell."""
    if column.kind == "choice":
        return rng.choice(column.choices)
    if column.kind == "real":
        return rng.randint(column.low * 10, column.high * 10) / 10
    if column.kind in ("int", "year"):
        return rng.randint(column.low, column.high)
    if column.kind == "date":
        return f"{rng.randint(column.low, column.high)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return words.draw(column.kind, rng)


def _draw_cells(column: Column, count: int, words: Words, rng: random.Random) -> list[str | int | float]:
    """A column's cells: numbers differ so that an order has no ties, some texts repeat so that groups exist."""
    cells: list[str | int | float] = []
    wide_enough = column.kind in ("real", "date") or (column.is_number and column.high - column.low >= 2 * count)
    while len(cells) < count:
        value = draw_value(column, words, rng)
        if (wide_enough or column.kind in ("title", "code")) and value in cells:
            continue
        if column.kind in ("person", "place", "org") and cells and rng.random() < 0.25:
            value = rng.choice(cells)
        cells.append(value)
    return cells


def draw_table(kind: TableKind, *, parent: Table | None, words: Words, rng: random.Random) -> Table:
    """Choose 3 to 5 of the kind's columns, in their order, and fill 8 to 14 rows (4 to 7 for a parent of others)."""
    count = rng.randint(min(3, len(kind.columns)), min(5, len(kind.columns)))
    chosen = tuple(kind.columns[index] for index in sorted(rng.sample(range(len(kind.columns)), count)))
    num_rows = rng.randint(8, 14)
    cells = [_draw_cells(column, num_rows, words, rng) for column in chosen]
    rows = []
    for index in range(num_rows):
        row: list[str | int | float] = [index + 1, *(column_cells[index] for column_cells in cells)]
        if parent:
            # The last parents stay without children, so that "without any" has an answer.
            row.append(rng.randint(1, max(2, len(parent.rows) - 2)))
        rows.append(tuple(row))
    return Table(name=kind.name, columns=chosen, parent=parent, rows=tuple(rows))


def draw_database(world: list[TableKind], *, num_tables: int, words: Words, rng: random.Random) -> Database:
    """A database of one table (any of the world's) or of a parent and one of its children."""
    if num_tables == 1:
        kind = rng.choice(world)
        return Database(tables=(draw_table(kind, parent=None, words=words, rng=rng),))
    parent = draw_table(world[0], parent=None, words=words, rng=rng)
    child = draw_table(rng.choice(world[1:]), parent=parent, words=words, rng=rng)
    return Database(tables=(parent, child))
