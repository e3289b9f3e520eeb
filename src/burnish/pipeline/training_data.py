"""What a model is tuned on: examples in memory or on disk, checked, with some of them set apart for evaluation.

It needs a tokenizer and no weights, so that data which cannot be learned from fails before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from burnish.data.preflight import Preflight
from burnish.data.split import check_split, split_rows
from burnish.data.token_cache import TokenCache
from burnish.data.token_cache_building import CacheRequest, cache_folder, open_token_cache
from burnish.data.tokenizer import Tokenizer
from burnish.errors import ConfigError
from burnish.models.atomic_files import writing_to
from burnish.pipeline.examples import DataConfig, prepare
from burnish.pipeline.progress import Progress, silent

BAD_ROWS_NAMED = 20


class Row(Protocol):
    """A sequence to learn from: token ids, and labels of the same length (see `data.encoding.Example`)."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def labels(self) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationChoice:
    """Rows for the evaluation loss: a source of their own, or a part of the training rows, or none.

    Attributes:
        source: as `DataConfig.source`.
        split: a share of the rows (below 1) or a number of them, see `split_rows`.
    """

    source: str | None = None
    split: float | None = None

    def __post_init__(self) -> None:
        if self.source is not None and self.split is not None:
            raise ConfigError("both --eval-data and --eval-split are given", remedy="Give one of them.")
        if self.split is not None:
            check_split(self.split)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Examples with what there is to know about them.

    Attributes:
        examples: to train on; a list, or a view of files.
        evaluation: for the evaluation loss, None for no rows.
        template: name of the template that they were rendered by.
        longest: tokens of the longest of both.
        label_tokens: tokens learned of an example, on average.
        preflight: of all examples, before the split.
        num_bad_rows, bad_rows: rows that cannot be used, and the first of them with their reasons.
        multi_turn: some rows are conversations.
        cache: folder of the token cache, None for examples in memory.
    """

    examples: Sequence[Row]
    evaluation: Sequence[Row] | None
    template: str
    longest: int
    label_tokens: int
    preflight: Preflight
    num_bad_rows: int
    bad_rows: list[str]
    multi_turn: bool
    cache: str | None = None

    @property
    def num_too_long(self) -> int:
        """Rows left out for their length."""
        return self.preflight.num_too_long


def training_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    longest: int | None = None,
    vocab_size: int | None = None,
    evaluation: EvaluationChoice | None = None,
    streaming: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> TrainingData:
    """Read, render, tokenize, check and split the rows of a run.

    Args:
        config: which rows.
        longest: what the model can take; shortens `config.max_length`.
        vocab_size: of the model.
        evaluation: rows for the evaluation loss; none when None.
        streaming: keep examples in a token cache on disk instead of in memory.
        seed: of the split.
        progress: told how many rows were tokenized.

    Raises:
        DataError: nothing usable, or the preflight failed.
        ConfigError: the evaluation is not possible so.
        CapacityError: the disk is full.
    """
    evaluation = evaluation or EvaluationChoice()
    load = _from_cache if streaming else _in_memory
    data = load(config, tokenizer, longest, progress)
    data.preflight.require(vocab_size=vocab_size)
    if evaluation.source is not None:
        held_out = replace(config, source=evaluation.source, template=data.template, limit=None)
        other = load(held_out, tokenizer, longest, progress)
        other.preflight.require(vocab_size=vocab_size)
        data = replace(data, evaluation=other.examples, longest=max(data.longest, other.longest))
    elif evaluation.split is not None:
        data = _split(data, evaluation.split, seed)
    return data


def _in_memory(config: DataConfig, tokenizer: Tokenizer, longest: int | None, progress: Progress) -> TrainingData:
    prepared = prepare(config, tokenizer, longest=longest)
    rows, made = prepared.rows, prepared.examples
    return TrainingData(
        examples=made.examples,
        evaluation=None,
        template=prepared.template.name,
        longest=made.stats.tokens_max,
        label_tokens=made.stats.label_tokens_total // made.stats.num_examples,
        preflight=made.preflight.with_bad_rows([bad.reason for bad in rows.bad_rows]),
        num_bad_rows=len(rows.bad_rows),
        bad_rows=[str(bad) for bad in rows.bad_rows[:BAD_ROWS_NAMED]],
        multi_turn=any("messages" in row.extra for row in rows.rows),
    )


def _from_cache(config: DataConfig, tokenizer: Tokenizer, longest: int | None, progress: Progress) -> TrainingData:
    request = CacheRequest(
        source=config.source,
        template=config.template,
        columns=config.columns,
        max_length=config.max_length if longest is None else min(config.max_length, longest),
        too_long="truncate" if config.too_long == "truncate" else "drop",
        learn="last" if config.learn == "last" else "all",
        limit=config.limit,
        check_sql=config.check_sql,
        seed=config.seed,
        offline=config.offline,
    )

    def on_progress(rows: int, tokens: int) -> None:
        progress(f"Tokenizing {config.source}", rows, rows, f"{tokens / 1e6:.1f} million tokens")

    root = cache_folder()
    with writing_to(root):
        cache = open_token_cache(request, tokenizer, on_progress=on_progress, root=root)
    record, stats = cache.record, cache.record["stats"]
    return TrainingData(
        examples=cache,
        evaluation=None,
        template=record["template"],
        longest=stats["tokens_max"],
        label_tokens=stats["label_tokens_total"] // stats["num_examples"],
        preflight=Preflight.from_dict(record["preflight"]),
        num_bad_rows=record["num_bad_rows"],
        bad_rows=record["bad_rows"],
        multi_turn=record["multi_turn"],
        cache=str(cache.folder),
    )


def _split(data: TrainingData, amount: float, seed: int) -> TrainingData:
    examples: Any = data.examples
    if isinstance(examples, TokenCache):
        train, held_out = split_rows(examples.keys, amount=amount, seed=seed)
        return replace(data, examples=examples.subset(train), evaluation=examples.subset(held_out))
    keys = np.fromiter((example.key for example in examples), dtype=np.uint64, count=len(examples))
    train, held_out = split_rows(keys, amount=amount, seed=seed)
    return replace(data, examples=[examples[row] for row in train], evaluation=[examples[row] for row in held_out])
