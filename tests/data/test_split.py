from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.split import split_rows
from burnish.errors import ConfigError, DataError

KEYS = np.random.default_rng(0).integers(0, 2**63, size=4000, dtype=np.uint64)


def test_share_is_met_and_both_parts_make_up_the_whole() -> None:
    train, held_out = split_rows(KEYS, amount=0.05, seed=0)
    assert sorted([*train, *held_out]) == list(range(len(KEYS)))
    assert 150 < len(held_out) < 250
    assert list(train) == sorted(train)


@given(share=st.floats(0.01, 0.9), seed=st.integers(0, 5), extra=st.integers(1, 500))
def test_added_rows_move_no_other(share: float, seed: int, extra: int) -> None:
    few = KEYS[:-extra]
    _, before = split_rows(few, amount=share, seed=seed)
    _, after = split_rows(KEYS, amount=share, seed=seed)
    assert set(before) == {row for row in after if row < len(few)}


@given(
    keys=st.lists(st.integers(0, 12), min_size=2, max_size=60),
    amount=st.one_of(st.floats(0.01, 0.9), st.integers(1, 20).map(float)),
)
def test_equal_rows_are_never_on_both_sides(keys: list[int], amount: float) -> None:
    try:
        train, held_out = split_rows(keys, amount=amount, seed=1)
    except DataError:
        return
    assert not {keys[row] for row in train} & {keys[row] for row in held_out}
    assert len(held_out) >= 1


def test_seed_decides_and_repeats() -> None:
    first = split_rows(KEYS, amount=0.1, seed=1)[1]
    assert list(first) == list(split_rows(KEYS, amount=0.1, seed=1)[1])
    other = split_rows(KEYS, amount=0.1, seed=2)[1]
    assert len(set(first) & set(other)) < 100


def test_number_of_rows_is_met_exactly_without_duplicates() -> None:
    assert len(split_rows(KEYS, amount=64, seed=0)[1]) == 64


def test_tiny_share_takes_one_row() -> None:
    assert len(split_rows(KEYS[:10], amount=0.0001, seed=0)[1]) == 1


def test_impossible_amounts_are_refused() -> None:
    for amount in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="a share below 1, or a number of rows"):
            split_rows(KEYS, amount=amount, seed=0)
    with pytest.raises(DataError, match="no row is left to train on"):
        split_rows(KEYS[:4], amount=4, seed=0)
    with pytest.raises(DataError, match="1 of them different"):
        split_rows([7, 7, 7], amount=0.5, seed=0)
