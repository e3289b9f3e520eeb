"""What is chosen for a budget: never what does not fit, never slower for more memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from burnish.errors import CapacityError
from burnish.train.config import TrainConfig
from burnish.train.fitting import Rows, Setting, choose, cost, in_words, settings
from burnish.train.inputs import order_of_rows, total_steps
from burnish.train.packing import pack, split_step


def rows_of(examples: list[Any], config: TrainConfig) -> Rows:
    order = order_of_rows(examples, config)
    return Rows(examples, order, steps=total_steps(order, config))


def random_case(seed: int) -> tuple[list[Setting], dict[Setting, int], dict[Setting, float]]:
    source = random.Random(seed)
    candidates = settings(
        TrainConfig(packing=source.random() < 0.7), precisions=("float32", "bfloat16"), device="cpu", layers=6
    )
    return (
        candidates,
        {one: source.randint(100, 1000) for one in candidates},
        {one: source.choice((1.0, 1.5, source.uniform(1, 4))) for one in candidates},
    )


def no_remedy(least: Setting, needed: int) -> str:
    return ""


@pytest.mark.parametrize("seed", range(20))
def test_choice_fits_is_the_fastest_and_never_slower_with_more_memory(seed: int) -> None:
    candidates, peak, time = random_case(seed)
    before = float("inf")
    for budget in range(0, 1100, 50):
        if budget < min(peak.values()):
            with pytest.raises(CapacityError, match="nothing fits"):
                choose(candidates, budget=budget, peak=peak.__getitem__, time=time.__getitem__, remedy=no_remedy)
            continue
        choice = choose(candidates, budget=budget, peak=peak.__getitem__, time=time.__getitem__, remedy=no_remedy)
        assert choice.peak_bytes == peak[choice.setting] <= budget
        assert choice.cost == min(time[one] for one in candidates if peak[one] <= budget)
        assert choice.cost <= before
        before = choice.cost


def test_a_budget_that_holds_nothing_names_the_least_and_what_to_try() -> None:
    candidates = settings(TrainConfig(), precisions=("bfloat16",), device="cpu", layers=4)
    with pytest.raises(CapacityError) as caught:
        choose(
            candidates,
            budget=5 << 20,
            peak=lambda one: 100 << 20,
            time=lambda one: 1.0,
            remedy=lambda least, needed: f"{needed >> 20} is the least, with {least.micro_batch_tokens} tokens.",
        )
    assert caught.value.exit_code == 3
    assert "5 MiB" in caught.value.message
    assert "100 is the least, with 512 tokens." in caught.value.message


def test_what_is_given_is_kept_and_rows_of_a_step_stay() -> None:
    config = TrainConfig(
        micro_batch_size=2, gradient_accumulation=3, micro_batch_tokens=200, gradient_checkpointing=True,
        checkpoint_every=2,
    )  # fmt: skip
    found = settings(config, precisions=("float32",), device="cpu", layers=4)
    assert [(one.micro_batch_tokens, one.checkpoint_every) for one in found] == [(200, 2)]
    assert found[0].applied(config).rows_per_step == 6
    padded = TrainConfig(micro_batch_size=4, gradient_accumulation=3, packing=False)
    sizes = {one.micro_batch_size for one in settings(padded, precisions=("float32",), device="cpu", layers=4)}
    assert sizes == {12, 6, 4, 3, 2, 1}
    for one in settings(padded, precisions=("float32",), device="cpu", layers=4):
        assert one.applied(padded).rows_per_step == 12


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(6, 64), (6, 32), (2, 128)])
def test_counted_micro_batches_are_those_of_the_step(
    make_rows: Callable[..., list[Any]], max_rows: int, max_tokens: int
) -> None:
    examples = make_rows(24, longest=60)
    config = TrainConfig(micro_batch_size=6)
    rows = rows_of(examples, config)
    batches = [
        pack(part, device="cpu")
        for step in order_of_rows(examples, config).epoch(0)
        for part in split_step([examples[row] for row in step], max_rows=max_rows, max_tokens=max_tokens)
    ]
    found = rows.micro_batches(max_rows=max_rows, max_tokens=max_tokens)
    assert found.positions == max(batch.num_slots for batch in batches)
    assert found.labels == max(batch.num_labels for batch in batches)
    assert found.widths == len({batch.num_slots for batch in batches})


def test_more_epochs_than_looked_at_are_bounded_by_the_longest_rows(make_rows: Callable[..., list[Any]]) -> None:
    examples = make_rows(24, longest=60)
    rows = rows_of(examples, TrainConfig(micro_batch_size=6, epochs=5))
    assert rows.micro_batches(max_rows=6, max_tokens=512).positions >= 5 * (max(map(len, (e.tokens for e in examples))))
    assert rows.micro_batches(max_rows=2, max_tokens=None).positions >= 2 * (rows.longest - 1)


def test_the_step_that_is_tried_holds_the_longest_row(make_rows: Callable[..., list[Any]]) -> None:
    examples = make_rows(40, longest=60)
    rows = rows_of(examples, TrainConfig(micro_batch_size=4))
    assert max(len(examples[row].tokens) for row in rows.largest_step) == int(np.max(rows.lengths))


def test_computing_again_costs_and_larger_micro_batches_pay(make_rows: Callable[..., list[Any]]) -> None:
    rows = rows_of(make_rows(40, longest=60), TrainConfig(micro_batch_size=8))

    def of(tokens: int, every: int, *, precision: str = "float32", full: bool = False, native: bool = True) -> float:
        one = Setting(precision=precision, micro_batch_size=8, micro_batch_tokens=tokens, checkpoint_every=every)
        return cost(one, rows.micro_batches(max_rows=8, max_tokens=tokens), full=full, native=native)

    assert of(512, 0) < of(512, 8) < of(512, 2) < of(512, 1)
    assert of(512, 0) < of(64, 0)
    assert of(512, 1, full=True) < of(512, 1)
    assert of(512, 0) < of(512, 0, precision="bfloat16", native=False)


def test_settings_are_told_in_words() -> None:
    config = TrainConfig(gradient_checkpointing=True, checkpoint_every=3)
    words = in_words(config, precision="bfloat16", device="cpu")
    assert words == "512 tokens at once, one block in 3 checkpointed, bfloat16"
