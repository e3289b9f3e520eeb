"""What a run is given: rows, checked before it begins, and how many steps they make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from burnish.errors import DataError
from burnish.train.batches import TrainingExample, count_labels
from burnish.train.config import TrainConfig
from burnish.train.row_order import RowOrder, row_lengths


def check_examples(examples: Sequence[TrainingExample], role: str) -> None:
    """Every row teaches something.

    Args:
        role: "training" or "evaluation", for messages.

    Raises:
        DataError: no rows, or a row that is malformed or has no label.
    """
    if not len(examples):
        raise DataError(f"the {role} data has no rows", expected="at least one")
    if hasattr(examples, "lengths"):  # a token cache: checked row by row when it was made
        return
    for number, example in enumerate(examples, 1):
        if len(example.tokens) != len(example.labels):
            raise DataError(
                f"{role} row {number} has tokens and labels of different lengths",
                got=f"{len(example.tokens)} and {len(example.labels)}",
            )
        if not count_labels(example):
            raise DataError(
                f"{role} row {number} teaches nothing: all its labels are masked",
                remedy="Raise the maximum length, or leave the row out.",
            )


def order_of_rows(examples: Sequence[TrainingExample], config: TrainConfig) -> RowOrder:
    """Which rows make which step of the run."""
    return RowOrder(
        lengths=row_lengths(examples),
        rows_per_step=config.rows_per_step,
        ordering=config.ordering,
        seed=config.seed,
        tokens_per_step=config.tokens_per_step,
    )


def total_steps(order: RowOrder, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    if config.steps is not None:
        return config.steps
    whole = len(order.lengths) / order.rows_per_step if order.tokens_per_step is None else order.steps_per_epoch()
    return max(1, math.ceil((config.epochs or 1.0) * whole - 1e-9))


def total_tokens(order: RowOrder, *, steps: int) -> int:
    """Tokens of the rows of the first so many steps, as the steps' records count them."""
    epochs, rest = divmod(steps, order.steps_per_epoch())
    whole = epochs * int(order.lengths.sum(dtype=np.int64))
    return whole + sum(int(order.lengths[rows].sum()) for rows in order.epoch(epochs)[:rest])
