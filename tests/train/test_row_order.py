from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import ConfigError
from burnish.train.config import TrainConfig
from burnish.train.row_order import RowOrder, row_lengths

LENGTHS = np.random.default_rng(3).integers(5, 90, size=101).astype(np.int32)


def order(ordering, tokens=None, seed: int = 0) -> RowOrder:
    return RowOrder(lengths=LENGTHS, rows_per_step=8, ordering=ordering, seed=seed, tokens_per_step=tokens)


@pytest.mark.parametrize("tokens", [None, 200])
@pytest.mark.parametrize("ordering", ["grouped", "shuffled", "given"])
def test_run_may_begin_at_any_step(ordering, tokens: int | None) -> None:
    rows = order(ordering, tokens)
    whole = list(islice(rows.start_from(0), 3 * rows.steps_per_epoch()))
    for start in (1, rows.steps_per_epoch() - 1, rows.steps_per_epoch(), 2 * rows.steps_per_epoch() + 1):
        assert (
            list(islice(rows.start_from(start), 5))
            == (whole + list(islice(rows.start_from(len(whole)), 5)))[start : start + 5]
        )
    first, second = whole[: rows.steps_per_epoch()], whole[rows.steps_per_epoch() : 2 * rows.steps_per_epoch()]
    assert rows.epoch(1) == second
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == list(range(101))
    assert (first == second) is (ordering == "given")
    for step in whole:
        assert [LENGTHS[row] for row in step] == sorted((LENGTHS[row] for row in step), reverse=True)


def test_only_the_epoch_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    real = RowOrder._epoch

    def watched(self: RowOrder, epoch: int):
        epochs.append(epoch)
        return real(self, epoch)

    monkeypatch.setattr(RowOrder, "_epoch", watched)
    next(order("grouped").start_from(13 * 1000 + 4))
    assert epochs == [1000]


@given(start=st.integers(0, 60), tokens=st.sampled_from([None, 64, 300]), seed=st.integers(0, 3))
def test_steps_are_a_function_of_seed_and_number(start: int, tokens: int | None, seed: int) -> None:
    def steps(begin: int):
        lengths = np.asarray(LENGTHS, dtype=np.int32)
        made = RowOrder(lengths=lengths, rows_per_step=8, ordering="shuffled", seed=seed, tokens_per_step=tokens)
        return made.start_from(begin)

    assert next(steps(start)) == next(islice(steps(0), start, None))


def test_packed_steps_hold_about_so_many_tokens() -> None:
    for ordering in ("grouped", "shuffled", "given"):
        steps = order(ordering, 300).epoch(0)
        sizes = [sum(LENGTHS[row] for row in step) for step in steps]
        assert max(sizes) <= 300
    assert len(order("grouped", 300).epoch(0)) <= -(-int(LENGTHS.sum()) // 300) + 1
    assert order("grouped", 300).epoch(0) != order("grouped", 300, seed=1).epoch(0)


def test_lengths_come_from_the_set_where_it_knows_them() -> None:
    class Known(list):
        lengths = np.array([4, 5], dtype=np.int32)

    assert list(row_lengths(Known([None, None]))) == [4, 5]


def test_tokens_per_step_takes_the_place_of_accumulation() -> None:
    assert TrainConfig(tokens_per_step=100).tokens_per_step == 100
    with pytest.raises(ConfigError, match="at least 1"):
        TrainConfig(tokens_per_step=0)
    with pytest.raises(ConfigError, match="both tokens_per_step and gradient_accumulation"):
        TrainConfig(tokens_per_step=100, gradient_accumulation=2)
