"""Queries: each builder draws one kind of SQL query together with a noun phrase that says what it returns.

A draft's `phrase` completes "Show ..." or "What is ...?"; `questions` are direct questions that the phrase cannot give.
`loose_sql` is the query without its filter, when it has one: a draft is only used if the filter changes the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from burnish.data.text_to_sql.conditions import AT_LEAST, GREATER, draw_condition
from burnish.data.text_to_sql.schema import Column, Database, Table, pluralize

AGGREGATES = (
    ("AVG", ("average", "mean")),
    ("SUM", ("total", "combined", "sum of the")),
    ("MAX", ("highest", "maximum", "largest")),
    ("MIN", ("lowest", "minimum", "smallest")),
)
# Number columns whose extremes have words of their own: (most, least).
SUPERLATIVES = {
    "price": ("most expensive", "cheapest"),
    "age": ("oldest", "youngest"),
    "weight": ("heaviest", "lightest"),
    "height": ("tallest", "shortest"),
    "length": ("longest", "shortest"),
    "speed": ("fastest", "slowest"),
    "size": ("biggest", "smallest"),
}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A query and the words for it."""

    kind: str
    sql: str
    phrase: str
    questions: tuple[str, ...] = ()
    ordered: bool = False
    loose_sql: str | None = None


def _pick(columns: list[Column], rng: random.Random) -> Column | None:
    return rng.choice(columns) if columns else None


def _shown(table: Table, rng: random.Random, *, most: int = 2) -> list[Column]:
    count = min(len(table.columns), rng.choice((1, 1, 2)[: most + 1] if most > 1 else (1,)))
    return rng.sample(list(table.columns), count)


def _listed(columns: list[Column], rng: random.Random) -> str:
    joint = rng.choice((" and ", " and the ", " and "))
    many = rng.random() < 0.35
    return joint.join(pluralize(column.phrase) if many and column.is_text else column.phrase for column in columns)


def _names(columns: list[Column]) -> str:
    return ", ".join(column.name for column in columns)


def _any_table(database: Database, rng: random.Random) -> Table:
    return rng.choice(database.tables)


def _measures(table: Table) -> list[Column]:
    return [column for column in table.columns if column.is_measure]


def _groups(table: Table) -> list[Column]:
    return [column for column in table.columns if column.kind in ("choice", "place", "person", "org")]


def select_all(database: Database, rng: random.Random) -> Draft:
    table = _any_table(database, rng)
    columns = _shown(table, rng)
    which = rng.choice(("all", "every one of the", "all the"))
    phrase = f"the {_listed(columns, rng)} of {which} {table.plural}"
    return Draft(kind="select", sql=f"SELECT {_names(columns)} FROM {table.name}", phrase=phrase)


def where(database: Database, rng: random.Random) -> Draft:
    table = _any_table(database, rng)
    columns = _shown(table, rng)
    condition = draw_condition(table, rng.choice(table.columns), rng)
    loose = f"SELECT {_names(columns)} FROM {table.name}"
    phrase = f"the {_listed(columns, rng)} of {rng.choice(('', 'the ', 'all '))}{table.plural} {condition.words}"
    questions = ()
    if len(columns) == 1:
        questions = (f"Which {columns[0].phrase} belongs to {table.plural} {condition.words}?",)
    return Draft(
        kind="where", sql=f"{loose} WHERE {condition.sql}", phrase=phrase, questions=questions, loose_sql=loose
    )


def where_two(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    if len(table.columns) < 2:
        return None
    first, second = rng.sample(list(table.columns), 2)
    left, right = draw_condition(table, first, rng), draw_condition(table, second, rng)
    columns = _shown(table, rng, most=1)
    word, operator = rng.choice((("and", "AND"), ("and", "AND"), ("or", "OR")))
    loose = f"SELECT {_names(columns)} FROM {table.name}"
    phrase = f"the {_listed(columns, rng)} of {table.plural} {left.words} {word} {right.words}"
    sql = f"{loose} WHERE {left.sql} {operator} {right.sql}"
    return Draft(kind="where_two", sql=sql, phrase=phrase, loose_sql=loose)


def count(database: Database, rng: random.Random) -> Draft:
    table = _any_table(database, rng)
    loose = f"SELECT COUNT(*) FROM {table.name}"
    if rng.random() < 0.2:
        questions = (f"How many {table.plural} are there?", f"How many {table.plural} do we have in total?")
        return Draft(kind="count", sql=loose, phrase=f"the number of {table.plural}", questions=questions)
    condition = draw_condition(table, rng.choice(table.columns), rng)
    phrase = f"{rng.choice(('the number of', 'the count of'))} {table.plural} {condition.words}"
    questions = (
        f"How many {table.plural} are there {condition.words}?",
        f"How many {table.plural} {condition.words} exist?",
    )
    return Draft(
        kind="count", sql=f"{loose} WHERE {condition.sql}", phrase=phrase, questions=questions, loose_sql=loose
    )


def count_distinct(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    column = _pick(_groups(table), rng)
    if column is None:
        return None
    word = rng.choice(("different", "distinct", "unique"))
    phrase = f"the number of {word} values of {column.phrase} among the {table.plural}"
    questions = (f"How many {word} values of {column.phrase} do the {table.plural} have?",)
    sql = f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name}"
    return Draft(kind="count_distinct", sql=sql, phrase=phrase, questions=questions)


def distinct(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    column = _pick(_groups(table), rng)
    if column is None:
        return None
    word = rng.choice(("different", "distinct", "unique"))
    phrase = f"the {word} values of {column.phrase} {rng.choice(('among', 'found in', 'of'))} the {table.plural}"
    return Draft(kind="distinct", sql=f"SELECT DISTINCT {column.name} FROM {table.name}", phrase=phrase)


def _aggregated(words: tuple[str, ...], column: Column, rng: random.Random) -> str:
    word = rng.choice(words)
    if column.counts_things and not word.startswith("sum"):
        return f"{word} number of {column.phrase}"
    return f"{word} {column.phrase}"


def aggregate(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    column = _pick(_measures(table), rng)
    if column is None:
        return None
    function, words = rng.choice(AGGREGATES)
    loose = f"SELECT {function}({column.name}) FROM {table.name}"
    head = f"the {_aggregated(words, column, rng)} of"
    others = [other for other in table.columns if other != column]
    if not others or rng.random() < 0.4:
        return Draft(kind="aggregate", sql=loose, phrase=f"{head} {rng.choice(('all ', 'the ', ''))}{table.plural}")
    condition = draw_condition(table, rng.choice(others), rng)
    phrase = f"{head} {rng.choice(('', 'the ', 'all '))}{table.plural} {condition.words}"
    return Draft(kind="aggregate", sql=f"{loose} WHERE {condition.sql}", phrase=phrase, loose_sql=loose)


def _order_words(column: Column, rng: random.Random) -> tuple[str, str]:
    """A direction in words and in SQL."""
    if column.is_number or column.kind == "date":
        up, down = ("from lowest to highest", "in ascending order"), ("from highest to lowest", "in descending order")
        if column.kind in ("year", "date"):
            up, down = ("from earliest to latest", "oldest first"), ("from latest to earliest", "newest first")
    else:
        up, down = ("alphabetically", "in alphabetical order"), ("in reverse alphabetical order", "in descending order")
    return rng.choice(((rng.choice(up), "ASC"), (rng.choice(down), "DESC")))


def order(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    columns = _shown(table, rng)
    key = _pick([column for column in table.columns if len(set(table.values(column))) == len(table.rows)], rng)
    if key is None:
        return None
    words, direction = _order_words(key, rng)
    verb = rng.choice(("sorted by", "ordered by", "ranked by"))
    loose = f"SELECT {_names(columns)} FROM {table.name}"
    phrase = (
        f"the {_listed(columns, rng)} of {rng.choice(('all ', 'the ', ''))}{table.plural} {verb} {key.phrase} {words}"
    )
    sql = f"{loose} ORDER BY {key.name} {direction}"
    return Draft(kind="order", sql=sql, phrase=phrase, ordered=True, loose_sql=loose)


def top(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    numbers = [
        column for column in table.columns if column.is_number and len(set(table.values(column))) == len(table.rows)
    ]
    key = _pick(numbers, rng)
    others = [column for column in table.columns if column != key]
    if key is None or not others:
        return None
    shown = [rng.choice(others)]
    limit = rng.choice((1, 1, 2, 3, 4, 5))
    most = rng.random() < 0.5
    many = table.plural if limit > 1 else table.name.replace("_", " ")
    number = "" if limit == 1 else f"{limit} "
    if key.name in SUPERLATIVES and rng.random() < 0.5:
        words = f"the {number}{SUPERLATIVES[key.name][0 if most else 1]} {many}"
    else:
        best = ("highest", "largest") if most else ("lowest", "smallest")
        if key.counts_things:
            best = ("most",) if most else ("fewest",)
        if key.kind == "year":
            best = ("latest", "most recent") if most else ("earliest", "first")
        words = f"the {number}{many} with the {rng.choice(best)} {key.phrase}"
    phrase = f"the {shown[0].phrase} of {words}"
    sql = f"SELECT {shown[0].name} FROM {table.name} ORDER BY {key.name} {'DESC' if most else 'ASC'} LIMIT {limit}"
    return Draft(kind="top", sql=sql, phrase=phrase, ordered=limit > 1)


def group(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    by = _pick(_groups(table), rng)
    if by is None:
        return None
    each = rng.choice(("for each", "per", "for every"))
    measure = _pick(_measures(table), rng)
    if measure is None or rng.random() < 0.45:
        phrase = f"the number of {table.plural} {each} {by.phrase}"
        questions = (f"How many {table.plural} are there {each} {by.phrase}?",)
        sql = f"SELECT {by.name}, COUNT(*) FROM {table.name} GROUP BY {by.name}"
        return Draft(kind="group", sql=sql, phrase=phrase, questions=questions)
    function, words = rng.choice(AGGREGATES)
    phrase = f"the {_aggregated(words, measure, rng)} of {table.plural} {each} {by.phrase}"
    sql = f"SELECT {by.name}, {function}({measure.name}) FROM {table.name} GROUP BY {by.name}"
    return Draft(kind="group", sql=sql, phrase=phrase)


def having(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    by = _pick(_groups(table), rng)
    if by is None:
        return None
    loose = f"SELECT {by.name} FROM {table.name} GROUP BY {by.name}"
    measure = _pick(_measures(table), rng)
    if measure is None or rng.random() < 0.6:
        limit = rng.randint(1, 3)
        sign, words = (">", rng.choice(GREATER[:3])) if rng.random() < 0.5 else (">=", AT_LEAST[0])
        phrase = f"each {by.phrase} with {words} {limit} {table.plural}"
        questions = (f"Which {by.phrase} has {words} {limit} {table.plural}?",)
        sql = f"{loose} HAVING COUNT(*) {sign} {limit}"
        return Draft(kind="having", sql=sql, phrase=phrase, questions=questions, loose_sql=loose)
    values = sorted(table.values(measure), key=float)
    limit = values[len(values) // 2]
    word = rng.choice(GREATER)
    average = _aggregated(("average",), measure, rng)
    phrase = f"each {by.phrase} whose {table.plural} have an {average} {word} {limit}"
    sql = f"{loose} HAVING AVG({measure.name}) > {limit}"
    return Draft(kind="having", sql=sql, phrase=phrase, loose_sql=loose)


def above_average(database: Database, rng: random.Random) -> Draft | None:
    table = _any_table(database, rng)
    measure = _pick(_measures(table), rng)
    others = [column for column in table.columns if column != measure]
    if measure is None or not others:
        return None
    shown = rng.choice(others)
    sign, words = rng.choice(((">", ("above", "higher than")), ("<", ("below", "lower than"))))
    if measure.counts_things:
        clause = rng.choice(("whose number of {c} is {w} average", "with a number of {c} {w} the average"))
    else:
        clause = rng.choice(("with {a} {w} the average", "whose {c} is {w} the average {c}", "with {a} {w} average"))
    clause = clause.format(c=measure.phrase, a=measure.phrase_with_article, w=rng.choice(words))
    phrase = f"the {shown.phrase} of {table.plural} {clause}"
    loose = f"SELECT {shown.name} FROM {table.name}"
    sql = f"{loose} WHERE {measure.name} {sign} (SELECT AVG({measure.name}) FROM {table.name})"
    return Draft(kind="nested", sql=sql, phrase=phrase, loose_sql=loose)


def _related(database: Database) -> tuple[Table, Table, str] | None:
    """Parent, child and the join between them, if the database has two tables."""
    if len(database.tables) < 2:
        return None
    parent, child = database.tables
    return parent, child, f"FROM {child.name} JOIN {parent.name} ON {child.name}.{child.foreign_key} = {parent.name}.id"


def join_where(database: Database, rng: random.Random) -> Draft | None:
    related = _related(database)
    if related is None:
        return None
    parent, child, joined = related
    shown = rng.choice(child.columns)
    condition = draw_condition(parent, rng.choice(parent.columns), rng, qualified=True)
    loose = f"SELECT {child.name}.{shown.name} {joined}"
    of = rng.choice((f"of the {parent.name}", f"that belong to the {parent.name}", f"of any {parent.name}"))
    phrase = f"the {shown.phrase} of {child.plural} {of} {condition.words}"
    return Draft(kind="join", sql=f"{loose} WHERE {condition.sql}", phrase=phrase, loose_sql=loose)


def join_show(database: Database, rng: random.Random) -> Draft | None:
    related = _related(database)
    if related is None:
        return None
    parent, child, joined = related
    mine, theirs = rng.choice(child.columns), rng.choice(parent.columns)
    each = rng.choice(("each", "every"))
    link = rng.choice(("together with", "along with", "and"))
    phrase = f"the {mine.phrase} of {each} {child.name} {link} the {theirs.phrase} of its {parent.name}"
    sql = f"SELECT {child.name}.{mine.name}, {parent.name}.{theirs.name} {joined}"
    return Draft(kind="join", sql=sql, phrase=phrase)


def join_count(database: Database, rng: random.Random) -> Draft | None:
    related = _related(database)
    if related is None:
        return None
    parent, child, joined = related
    condition = draw_condition(parent, rng.choice(parent.columns), rng, qualified=True)
    loose = f"SELECT COUNT(*) {joined}"
    phrase = f"the number of {child.plural} of the {parent.name} {condition.words}"
    questions = (f"How many {child.plural} belong to the {parent.name} {condition.words}?",)
    return Draft(kind="join", sql=f"{loose} WHERE {condition.sql}", phrase=phrase, questions=questions, loose_sql=loose)


def without_children(database: Database, rng: random.Random) -> Draft | None:
    related = _related(database)
    if related is None:
        return None
    parent, child, _ = related
    shown = rng.choice(parent.columns)
    has, operator = rng.choice(
        ((("without any", "that have no"), "NOT IN"), (("that have at least one", "with at least one"), "IN"))
    )
    noun = child.plural if operator == "NOT IN" else child.name
    phrase = f"the {shown.phrase} of {parent.plural} {rng.choice(has)} {noun}"
    loose = f"SELECT {shown.name} FROM {parent.name}"
    sql = f"{loose} WHERE id {operator} (SELECT {child.foreign_key} FROM {child.name})"
    return Draft(kind="nested", sql=sql, phrase=phrase, loose_sql=loose)


Builder = Callable[[Database, random.Random], Draft | None]

# How often each kind is drawn.
SINGLE_TABLE: tuple[tuple[Builder, int], ...] = (
    (select_all, 1),
    (where, 6),
    (where_two, 4),
    (count, 3),
    (count_distinct, 1),
    (distinct, 1),
    (aggregate, 3),
    (order, 3),
    (top, 3),
    (group, 3),
    (having, 2),
    (above_average, 2),
)
TWO_TABLES: tuple[tuple[Builder, int], ...] = ((join_where, 4), (join_show, 2), (join_count, 2), (without_children, 2))


def draw_draft(database: Database, rng: random.Random) -> Draft:
    """One query on the database; with two tables, mostly one that needs both."""
    use = TWO_TABLES if len(database.tables) > 1 and rng.random() < 0.75 else SINGLE_TABLE
    builders, weights = zip(*use)
    while True:
        draft = rng.choices(builders, weights)[0](database, rng)
        if draft is not None:
            return draft
