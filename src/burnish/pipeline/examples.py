"""Rows to examples for a stage: reading, template, length, and the held-out texts on which a child meets its parent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from burnish.data.examples import LEARN, ExampleSet, make_examples
from burnish.data.rows import RowSet, read_rows
from burnish.data.templates import Template, pick_template
from burnish.data.tokenizer import Tokenizer
from burnish.errors import SettingError

GATE_DATA = "text-to-sql:validation:64"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they become examples.

    Attributes:
        source: path, hub id, or text-to-sql:SPLIT[:COUNT].
        template: "auto", "chat", "alpaca", "sql-context" or "plain".
        columns: field -> column where the layout is not recognised.
        max_length: longest example in tokens.
        too_long: "drop" or "truncate" longer ones.
        learn: of conversations, "all" answers or the "last" one.
        limit: use this many rows at most.
        check_sql: leave out rows whose SQL does not run on their own schema.
        seed: of generated rows.
    """

    source: str
    template: str = "auto"
    columns: Mapping[str, str] | None = None
    max_length: int = 512
    too_long: str = "drop"
    learn: str = "all"
    limit: int | None = None
    check_sql: bool = False
    seed: int = 0
    offline: bool = False

    def __post_init__(self) -> None:
        problems = [
            SettingError(f"{{{name}}} is {fault}", got=repr(getattr(self, name)), expected=expected)
            for name, holds, fault, expected in (
                ("max_length", self.max_length >= 2, "out of range", "2 or more"),
                ("too_long", self.too_long in ("drop", "truncate"), "not known", "drop or truncate"),
                ("learn", self.learn in LEARN, "not known", "all or last"),
                ("limit", self.limit is None or self.limit >= 1, "out of range", "1 or more"),
            )
            if not holds
        ]
        if problems:
            raise SettingError.of(problems)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows with the template they are rendered by, and the examples made of them."""

    rows: RowSet
    template: Template
    examples: ExampleSet


def read_data(config: DataConfig, *, texts: bool = False) -> RowSet:
    """The usable rows and the bad ones; with `texts`, also of a source that only has texts."""
    return read_rows(
        config.source,
        columns=config.columns,
        limit=config.limit,
        check_sql=config.check_sql,
        seed=config.seed,
        offline=config.offline,
        texts=texts,
    )


def prepare(config: DataConfig, tokenizer: Tokenizer, *, longest: int | None = None) -> Prepared:
    """Read rows and make examples.

    Args:
        longest: what the model can take; shortens `max_length`.

    Raises:
        DataError: nothing usable.
    """
    rows = read_data(config, texts=True)
    template = pick_template(config.template, tokenizer, rows)
    limit = config.max_length if longest is None else min(config.max_length, longest)
    examples = make_examples(
        rows.rows,
        tokenizer,
        template,
        max_length=limit,
        too_long="truncate" if config.too_long == "truncate" else "drop",
        learn="last" if config.learn == "last" else "all",
    )
    return Prepared(rows=rows, template=template, examples=examples)


def held_out_config(*, data: str | None, recorded: Mapping[str, object] | None) -> DataConfig:
    """Where held-out rows come from: as given, else as the model was evaluated while tuning, else the bundled task's.

    Args:
        data: a source that the user named.
        recorded: "data" of the model's manifest.
    """
    recorded = recorded or {}
    source = data or recorded.get("eval_source") or GATE_DATA
    columns = recorded.get("columns")
    return DataConfig(
        source=str(source),
        template=str(recorded.get("template") or "auto"),
        columns=columns if isinstance(columns, Mapping) and source == recorded.get("eval_source") else None,
        max_length=512,
        limit=64,
    )


def held_out(
    tokenizer: Tokenizer, *, data: str | None, recorded: Mapping[str, object] | None, longest: int
) -> ExampleSet:
    """Texts for a gate, of `held_out_config`."""
    return prepare(held_out_config(data=data, recorded=recorded), tokenizer, longest=longest).examples
