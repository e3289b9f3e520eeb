"""Parameters are checked where they are made."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from burnish.engine.sampling import MAX_CONSTRAINT_CHARS, SamplingParams
from burnish.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 101.0),
        ("presence_penalty", 2.1),
        ("presence_penalty", "much"),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("inf")),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", 3),
        ("logit_bias", [(1, 2.0), (1, 3.0)]),
        ("seed", "x"),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("include_stop", 1),
        ("ignore_eos", "yes"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["2"]),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("json_schema", "{"),
        ("json_schema", "[]"),
        ("json_schema", {"enum": [{1, 2}]}),
        ("json_schema", {"const": float("nan")}),
        ("regex", ""),
        ("regex", 3),
        ("grammar", b"start: x"),
        ("grammar", "x" * (MAX_CONSTRAINT_CHARS + 1)),
        ("json_schema", {"description": "x" * MAX_CONSTRAINT_CHARS}),
        ("json_schema", "{" * 10**6),
    ],
)
def test_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400


def test_schema_too_deep_is_refused() -> None:
    with pytest.raises(RequestError, match="json_schema"):
        SamplingParams(json_schema='{"a":' * 9000 + "1" + "}" * 9000)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens is larger"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_two_constraints_are_refused() -> None:
    with pytest.raises(RequestError, match="one constraint only; got json_schema and regex"):
        SamplingParams(json_schema={}, regex="a")


@pytest.mark.parametrize("setting", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_settings_that_fight_with_a_constraint_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"regex and .* exclude each other"):
        SamplingParams(regex="a+", **setting)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_zero_temperature_is_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.1).greedy


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {1: 1}},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
        {"json_schema": {}},
        {"regex": "a"},
        {"grammar": "start: 'a'"},
    ],
)
def test_only_plain_greedy_is_plain(setting: dict[str, Any]) -> None:
    assert SamplingParams(stop="x", seed=3, n=2, top_k=5, ignore_eos=False, stop_token_ids=[4]).plain_greedy
    assert not SamplingParams(**setting).plain_greedy


def test_parameters_are_values() -> None:
    """Equal ones are equal and hash alike, and what they were made from may change afterwards."""
    bias, schema = {7: 1, 2: -3.0}, {"type": "object", "properties": {"b": {}, "a": {}}}
    one = SamplingParams(logit_bias=bias, json_schema=schema, stop=["x"])
    two = SamplingParams(logit_bias=dict(reversed(bias.items())), json_schema=json.dumps(schema), stop="x")
    assert one == two
    assert hash(one) == hash(two)
    bias[9] = 9
    assert one.biases == ((2, -3.0), (7, 1.0))
    assert list(json.loads(str(one.json_schema))["properties"]) == ["b", "a"]
    assert dataclasses.replace(one, n=3).biases == one.biases
    assert one.constraint == ("json_schema", one.json_schema)


@pytest.mark.parametrize("temperature", [1e-300, 9e-6])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature, top_p=1e-9).greedy
    assert not SamplingParams(temperature=1e-5).greedy
