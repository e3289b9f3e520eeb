"""Order of rows and padding."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from burnish.train.batches import collate
from burnish.train.row_order import Ordering, RowOrder

LENGTHS = random.Random(1).choices(range(5, 200), k=101)


def order(ordering: Ordering, *, rows_per_step: int = 8, seed: int = 0) -> RowOrder:
    return RowOrder(lengths=np.asarray(LENGTHS), rows_per_step=rows_per_step, ordering=ordering, seed=seed)


@pytest.mark.parametrize("ordering", ["grouped", "shuffled", "given"])
def test_every_row_comes_once_per_epoch(ordering: Ordering) -> None:
    steps = order(ordering).epoch(0)
    assert sorted(chain.from_iterable(steps)) == list(range(101))
    assert [len(step) for step in steps].count(8) == 12


def test_order_follows_seed_and_epoch() -> None:
    first = list(islice(order("grouped").start_from(0), 26))
    again = list(islice(order("grouped").start_from(0), 26))
    other = list(islice(order("grouped", seed=1).start_from(0), 26))
    assert first == again != other
    assert first[:13] != first[13:], "each epoch has its own order"


def test_grouping_by_length_removes_most_padding() -> None:
    def padding(ordering: Ordering) -> int:
        steps = order(ordering).epoch(0)
        return sum(len(step) * max(LENGTHS[row] for row in step) - sum(LENGTHS[row] for row in step) for step in steps)

    assert padding("grouped") < 0.15 * padding("shuffled")


def test_given_order_keeps_the_rows_of_each_step() -> None:
    steps = order("given", rows_per_step=4, seed=9).epoch(3)
    assert [sorted(step) for step in steps[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_collate_shifts_labels_and_masks_padding(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(2, shortest=4, longest=9)
    longer, shorter = sorted(rows, key=lambda row: -len(row.tokens))
    batch = collate([longer, shorter], device="cpu")
    width, real = len(longer.tokens) - 1, len(shorter.tokens) - 1
    assert batch.tokens_BT.shape == (2, width)
    assert batch.tokens_BT[1].tolist() == shorter.tokens[:-1] + [0] * (width - real)
    assert batch.labels_BT[1].tolist() == shorter.labels[1:] + [-100] * (width - real)
    assert batch.num_tokens == len(longer.tokens) + len(shorter.tokens)
    assert batch.num_labels == int((batch.labels_BT != -100).sum())
