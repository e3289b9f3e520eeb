"""The roofline: which side binds, and how it scales."""

from __future__ import annotations

import dataclasses

import pytest

from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES
from burnish.plan.devices import DEVICES
from burnish.plan.options import PlanOptions
from burnish.plan.timing import (
    BANDWIDTH_EFFICIENCY,
    generation_time,
    quantization_seconds,
    training_operations,
    training_seconds,
)
from burnish.plan.weights import block_linears, weight_bytes

CONFIG = config_of(SHAPES["mistral-7b"])
WEIGHTS = weight_bytes(CONFIG, "float16").total


def test_one_request_decodes_at_the_speed_of_reading_weights() -> None:
    options = PlanOptions(concurrency=1, input_tokens=1, output_tokens=2)
    times = generation_time(CONFIG, DEVICES["t4"], options, dtype="float16", weights=WEIGHTS)
    assert times is not None
    assert times.tpot_ms == pytest.approx(1e3 * WEIGHTS / (320e9 * BANDWIDTH_EFFICIENCY), rel=0.01)


def test_prompts_take_longer_in_proportion_to_their_tokens() -> None:
    short, long = (
        generation_time(CONFIG, DEVICES["t4"], PlanOptions(input_tokens=count), dtype="float16", weights=WEIGHTS)
        for count in (256, 512)
    )
    assert short is not None
    assert long is not None
    assert long.ttft_ms / short.ttft_ms == pytest.approx(2, rel=0.1)


def test_rates_unknown_give_no_times() -> None:
    bare = dataclasses.replace(DEVICES["t4"], fp32=None, fp16=None, bandwidth=None)
    options = PlanOptions(train_tokens=1000)
    assert generation_time(CONFIG, bare, options, dtype="float16", weights=WEIGHTS) is None
    assert training_seconds(CONFIG, bare, options, dtype="float16", full=False) is None
    assert quantization_seconds(CONFIG, bare, options) is None


def test_full_training_costs_half_as_much_again_as_an_adapter() -> None:
    options = PlanOptions(train_tokens=10**6)
    adapter = training_seconds(CONFIG, DEVICES["a100-40g"], options, dtype="bfloat16", full=False)
    full = training_seconds(CONFIG, DEVICES["a100-40g"], options, dtype="bfloat16", full=True)
    assert adapter is not None
    assert full is not None
    assert full / adapter == pytest.approx(1.5, rel=0.05)


def test_training_time_needs_a_number_of_tokens() -> None:
    assert training_seconds(CONFIG, DEVICES["t4"], PlanOptions(), dtype="float16", full=False) is None


def test_training_operations_are_six_per_trained_weight_four_per_frozen_and_two_more_recomputed() -> None:
    body = sum(rows * columns for rows, columns in block_linears(CONFIG))
    head = CONFIG.vocab_size * CONFIG.hidden_size
    full = training_operations(CONFIG, trained=body, head_trained=True)
    assert full.of(tokens=10, label_tokens=4, squared_lengths=0) == 6 * 10 * body + 6 * 4 * head
    frozen = training_operations(CONFIG, trained=0, adapter=1000)
    assert frozen.of(tokens=10, label_tokens=4, squared_lengths=0) == 10 * (4 * body + 6 * 1000) + 4 * 4 * head
    again = training_operations(CONFIG, trained=0, adapter=1000, recomputed=1.0)
    assert again.per_token - frozen.per_token == 2 * (body + 1000)
    # Scores and their product with the values: 2 T^2 x heads x width each over the whole square, half of it causal.
    width = CONFIG.num_heads * CONFIG.head_dim * CONFIG.num_layers
    assert frozen.of(tokens=0, label_tokens=0, squared_lengths=100**2) == 3 * (2 * 100**2 * width)
    assert again.per_square == frozen.per_square * 4 / 3
