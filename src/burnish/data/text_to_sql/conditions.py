"""Conditions: one WHERE term and the words for it, drawn together so that they agree."""

from __future__ import annotations

import random
from dataclasses import dataclass

from burnish.data.text_to_sql.schema import Column, Table, sql_literal

GREATER = ("greater than", "more than", "over", "above", "higher than", "larger than")
LESS = ("less than", "below", "under", "lower than", "smaller than", "fewer than")
AT_LEAST = ("at least", "no less than", "not below")
AT_MOST = ("at most", "no more than", "not above")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A WHERE term and a clause that follows the table's plural, such as "whose price is over 20"."""

    sql: str
    words: str


def _said(value: str | int | float, rng: random.Random) -> str:
    """A value in a sentence; text is quoted now and then."""
    if isinstance(value, str) and rng.random() < 0.25:
        return f"'{value}'"
    return str(value)


def _number_clause(column: Column, relation: str, rng: random.Random) -> str:
    if column.counts_things:
        form = rng.choice(("with {r} {c}", "that have {r} {c}", "having {r} {c}", "where the number of {c} is {r}"))
    else:
        form = rng.choice(
            (
                "whose {c} is {r}",
                "whose {c} is {r}",
                "with {a} {r}",
                "that have {a} {r}",
                "where the {c} is {r}",
                "having {a} {r}",
            )
        )
    return form.format(c=column.phrase, a=column.phrase_with_article, r=relation)


def _text_condition(column: Column, name: str, values: list[str], rng: random.Random) -> Condition:
    phrase, value = column.phrase, rng.choice(values)
    roll = rng.random()
    if roll < 0.45:
        form = rng.choice(
            ("whose {c} is {v}", "whose {c} is {v}", "with {v} as {c}", "where the {c} is {v}", "with the {c} {v}")
        )
        return Condition(sql=f"{name} = {sql_literal(value)}", words=form.format(c=phrase, v=_said(value, rng)))
    if roll < 0.65:
        form = rng.choice(
            (
                "whose {c} is not {v}",
                "where the {c} is not {v}",
                "whose {c} is different from {v}",
                "whose {c} is anything but {v}",
            )
        )
        return Condition(sql=f"{name} <> {sql_literal(value)}", words=form.format(c=phrase, v=_said(value, rng)))
    others = sorted({other for other in values if other != value})
    if roll < 0.8 and others:
        other = rng.choice(others)
        form = rng.choice(("whose {c} is {v} or {w}", "whose {c} is either {v} or {w}", "where the {c} is {v} or {w}"))
        words = form.format(c=phrase, v=_said(value, rng), w=_said(other, rng))
        return Condition(sql=f"{name} IN ({sql_literal(value)}, {sql_literal(other)})", words=words)
    where = rng.choice(("start", "end", "contain"))
    word = rng.choice(value.split())
    if where == "start":
        piece = value[: rng.randint(1, 3)].strip()
        verb = rng.choice(("starts with", "begins with"))
        return Condition(sql=f"{name} LIKE '{piece}%'", words=f"whose {phrase} {verb} {piece}")
    if where == "end":
        word = value.split()[-1]
        return Condition(sql=f"{name} LIKE '%{word}'", words=f"whose {phrase} ends with {word}")
    verb = rng.choice(("contains", "includes", "has in it"))
    return Condition(sql=f"{name} LIKE '%{word}%'", words=f"whose {phrase} {verb} {word}")


def _time_condition(column: Column, name: str, values: list[str | int | float], rng: random.Random) -> Condition:
    value = rng.choice(values)
    literal = sql_literal(value)
    sign, words = rng.choice(
        (
            ("=", ("",)),
            (">", ("after ", "later than ")),
            ("<", ("before ", "earlier than ")),
            (">=", ("since ",)),
            ("<=", ("until ",)),
        )
    )
    word = rng.choice(words)
    form = rng.choice(("whose {c} is {w}{v}", "with {a} {w}{v}", "where the {c} is {w}{v}"))
    if sign in (">=", "<="):
        form = "with {a} {w}{v}"
    return Condition(
        sql=f"{name} {sign} {literal}",
        words=form.format(c=column.phrase, a=column.phrase_with_article, w=word, v=value),
    )


def _number_condition(column: Column, name: str, values: list[str | int | float], rng: random.Random) -> Condition:
    value = rng.choice(values)
    roll = rng.random()
    if roll < 0.2 and len(set(values)) > 3:
        low, high = sorted(rng.sample(sorted(set(values)), 2))  # type: ignore[type-var]
        relation = rng.choice((f"between {low} and {high}", f"between {low} and {high}", f"from {low} to {high}"))
        return Condition(sql=f"{name} BETWEEN {low} AND {high}", words=_number_clause(column, relation, rng))
    if roll < 0.3:
        if column.counts_things:
            words = rng.choice(("with {v} {c}", "with exactly {v} {c}", "that have {v} {c}"))
        else:
            words = rng.choice(
                ("whose {c} is {v}", "whose {c} is exactly {v}", "whose {c} equals {v}", "with {a} of {v}")
            )
        return Condition(
            sql=f"{name} = {value}", words=words.format(c=column.phrase, a=column.phrase_with_article, v=value)
        )
    if roll < 0.38:
        number = "number of " if column.counts_things else ""
        words = rng.choice((f"whose {number}{{c}} is not {{v}}", f"whose {number}{{c}} is different from {{v}}"))
        return Condition(sql=f"{name} <> {value}", words=words.format(c=column.phrase, v=value))
    sign, relations = rng.choice(
        ((">", GREATER), ("<", LESS), (">=", AT_LEAST), ("<=", AT_MOST), (">", GREATER), ("<", LESS))
    )
    return Condition(
        sql=f"{name} {sign} {value}", words=_number_clause(column, f"{rng.choice(relations)} {value}", rng)
    )


def draw_condition(table: Table, column: Column, rng: random.Random, *, qualified: bool = False) -> Condition:
    """A condition on one column with values that occur in the table.

    Args:
        qualified: write table.column, as a join needs.
    """
    name = f"{table.name}.{column.name}" if qualified else column.name
    values = table.values(column)
    if column.is_text:
        return _text_condition(column, name, [str(value) for value in values], rng)
    if column.kind == "code":
        value = str(rng.choice(values))
        return Condition(sql=f"{name} = '{value}'", words=f"whose {column.phrase} is {value}")
    if column.kind in ("year", "date"):
        return _time_condition(column, name, values, rng)
    return _number_condition(column, name, values, rng)
