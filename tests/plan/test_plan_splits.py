"""Which way of dividing a model fits so many cards."""

from __future__ import annotations

import pytest

from burnish.errors import ConfigError
from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES
from burnish.plan.devices import find_device
from burnish.plan.options import PlanOptions
from burnish.plan.predict import plan
from burnish.plan.sharding import advised, predict_splits

OPTIONS = PlanOptions(dtype="float16", concurrency=64)


def splits(name: str, cards: int, device: str = "t4"):  # type: ignore[no-untyped-def]
    return predict_splits(config_of(SHAPES[name]), cards=cards, device=find_device(device), options=OPTIONS)


def test_two_small_cards_hold_what_one_does_not() -> None:
    found = plan(config_of(SHAPES["mistral-7b"]), device="t4", options=OPTIONS, stages=("inference",), cards=2)
    assert not found.stage("inference").fits
    assert [(split.tensor_parallel, split.pipeline_parallel) for split in found.splits] == [(2, 1), (1, 2)]
    whole = found.stage("inference").components
    for split in found.splits:
        assert split.fits
        for part in ("weights", "kv"):
            assert split.components[part] == pytest.approx(whole[part] / 2, rel=0.03)
        assert split.components["runtime"] == whole["runtime"]
        assert split.peak_bytes == sum(split.components.values())
    chosen = advised(found.splits)
    assert chosen is not None
    assert (chosen.tensor_parallel, chosen.pipeline_parallel) == (2, 1)
    assert found.to_dict()["splits"][0]["tensor_parallel"] == 2
    assert found.splits[0].sent_bytes_per_token > 10 * found.splits[1].sent_bytes_per_token


def test_one_card_has_no_splits_to_choose_from() -> None:
    assert plan(config_of(SHAPES["gpt2"]), device="t4", options=OPTIONS, stages=("load",)).splits == ()
    (alone,) = splits("gpt2", 1)
    assert alone.sent_bytes_per_token == 0
    with pytest.raises(ConfigError, match="cards is out of range"):
        splits("gpt2", 0)


def test_what_cannot_be_cut_says_why_and_copies_are_avoided() -> None:
    by_ways = {(split.tensor_parallel, split.pipeline_parallel): split for split in splits("mistral-7b", 33)}
    assert "cannot be cut" in (by_ways[33, 1].reason or "")
    assert not by_ways[33, 1].fits
    assert by_ways[3, 11].fits
    found = splits("mistral-7b", 16)
    assert [split.copied_kv_heads for split in found] == [True, False, False, False, False]
    chosen = advised(found)
    assert chosen is not None
    assert (chosen.tensor_parallel, chosen.pipeline_parallel) == (8, 2)
    assert advised(splits("bloom-7b1", 1, "t4")) is None or splits("bloom-7b1", 1, "t4")[0].fits


def test_ranks_on_one_machine_have_to_fit_together() -> None:
    config, device = config_of(SHAPES["135m"]), find_device("cpu")
    one, two = (predict_splits(config, cards=n, device=device, options=OPTIONS)[0] for n in (1, 2))
    assert one.fits
    assert two.fits == (two.peak_bytes + two.least_bytes <= device.usable_bytes)
