"""The sampler's rules through the native engine: every answer of a batch is the one it would be alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.engine.transformers_engine import TransformersEngine
from burnish.errors import RequestError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

MakePrompts = Callable[..., list[list[int]]]

RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.3, "seed": 2, "top_p": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.3, "logit_bias": {5: 3.0, 2: -100}},
    {"temperature": 0.7, "seed": 3, "top_k": 12, "min_p": 0.02, "min_tokens": 10},
    {"temperature": 1.0, "seed": 4, "logprobs": 3},
]
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9999}, "ok": {"type": "boolean"}},
    "required": ["id", "ok"],
    "additionalProperties": False,
}


def close(one: RequestOutput, other: RequestOutput) -> bool:
    """Equal tokens, and equal log-probabilities up to rounding."""
    if one.token_ids != other.token_ids or one.finish_reason != other.finish_reason:
        return False
    if one.logprobs is None or other.logprobs is None:
        return one.logprobs is other.logprobs
    return all(
        mine.token_id == theirs.token_id and mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        for mine, theirs in zip(one.logprobs, other.logprobs)
    )


@pytest.mark.parametrize("tight", [False, True])
def test_rules_in_one_batch_equal_each_alone(tight: bool, decoder: Decoder, make_prompts: MakePrompts) -> None:
    """Also where blocks are so few that sequences are preempted and computed anew."""
    prompts = make_prompts(12, seed=5)
    params = [SamplingParams(max_tokens=24, **RULES[row % len(RULES)]) for row in range(12)]
    alone = [next(NativeEngine(decoder).generate([one], which)) for one, which in zip(prompts, params)]
    config = decoder.config
    block_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * 16
    engine = NativeEngine(
        decoder,
        kv_memory=(7 if tight else 100) * block_bytes,
        max_num_seqs=8,
        max_batch_tokens=20,
        max_model_len=80,
    )
    together = list(engine.generate(prompts, params))
    assert all(close(one, other) for one, other in zip(alone, together))
    assert (engine.stats().preemptions > 0) == tight


def test_logprobs_equal_a_full_forward(decoder: Decoder, make_prompts: MakePrompts) -> None:
    [prompt] = make_prompts(1, seed=8, shortest=50, longest=60)
    params = SamplingParams(
        max_tokens=10, temperature=0.8, seed=1, logprobs=2, prompt_logprobs=4, presence_penalty=1.0, ignore_eos=True
    )
    # The prompt is read in pieces, beside another request, twice (the second time from the prefix cache).
    engine = NativeEngine(decoder, max_batch_tokens=16, max_num_seqs=4)
    free = SamplingParams(max_tokens=30, ignore_eos=True)
    for _ in range(2):
        output, _ = engine.generate([prompt, [4, 5, 6]], [params, free])
        with torch.no_grad():
            logprobs_TV = decoder(torch.tensor([[*prompt, *output.token_ids]]))[0].log_softmax(dim=-1)
        assert output.prompt_logprobs is not None
        assert output.logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for position, entry in enumerate([*output.prompt_logprobs[1:], *output.logprobs], start=1):
            assert entry is not None
            expected_V = logprobs_TV[position - 1]
            assert entry.token_id == [*prompt, *output.token_ids][position]
            assert entry.logprob == pytest.approx(float(expected_V[entry.token_id]), abs=1e-4)
            count = 4 if position < len(prompt) else 2
            assert [token for token, _ in entry.top] == expected_V.topk(count).indices.tolist()


def test_choices_are_told_apart_and_repeat(decoder: Decoder) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=12, logprobs=0)
    output, other = NativeEngine(decoder).generate([[5, 6, 7], [8]], params)
    [again] = NativeEngine(decoder, max_num_seqs=1).generate([[5, 6, 7]], params)
    assert len({choice.token_ids for choice in output.choices}) == 4
    assert [choice.token_ids for choice in output.choices] == [choice.token_ids for choice in again.choices]
    assert output.token_ids == output.choices[0].token_ids
    assert all(len(choice.logprobs or ()) == len(choice.token_ids) for choice in other.choices)
    [single] = NativeEngine(decoder).generate([[5, 6, 7]], SamplingParams(temperature=1.0, seed=7, max_tokens=12))
    assert single.token_ids == output.choices[0].token_ids


@pytest.fixture(scope="module")
def constrained_engine() -> NativeEngine:
    pytest.importorskip("llguidance", reason="needs the extra constrained")
    tokenizer = Tokenizer.load(bundled_path("burnish-sql-base"))
    config = ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size + 24,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=8,
        max_position_embeddings=512,
        eos_ids=tuple(tokenizer.eos_ids),
    )
    decoder = Decoder(config).initialize(std=0.4, seed=3).eval()
    return NativeEngine(decoder, tokenizer=tokenizer, max_num_seqs=4, max_batch_tokens=24)


def test_mixed_batch_follows_and_free_requests_are_not_touched(constrained_engine: NativeEngine) -> None:
    prompts = ["SELECT", "name", "FROM t", "42", "x", "WHERE a"]
    settings: list[dict[str, Any]] = [
        {"json_schema": SCHEMA},
        {"temperature": 1.0, "seed": 1},
        {"regex": r"[A-Z]{2}-\d{3}", "temperature": 1.0, "seed": 2},
        {},
        {"grammar": 'start: "SELECT " /[a-z]{1,8}/ (", " /[a-z]{1,8}/)? " FROM t"', "temperature": 1.0, "seed": 3},
        {"json_schema": SCHEMA, "temperature": 1.5, "seed": 4, "logprobs": 1},
    ]
    params = [SamplingParams(max_tokens=100, **one) for one in settings]
    outputs = list(constrained_engine.generate(prompts, params))
    for place in (0, 5):
        value = json.loads(outputs[place].text)
        assert list(value) == ["id", "ok"]
        assert type(value["id"]) is int
        assert 0 <= value["id"] <= 9999
        assert type(value["ok"]) is bool
    assert re.fullmatch(r"[A-Z]{2}-\d{3}", outputs[2].text)
    assert re.fullmatch(r"SELECT [a-z]{1,8}(, [a-z]{1,8})? FROM t", outputs[4].text)
    assert {outputs[place].finish_reason for place in (0, 2, 4, 5)} == {"stop"}
    for prompt, which, output in zip(prompts, params, outputs):
        [alone] = constrained_engine.generate([prompt], which)
        assert close(alone, output)


def test_bad_constraint_is_refused_before_anything_runs(constrained_engine: NativeEngine) -> None:
    with pytest.raises(RequestError, match="unclosed group"):
        constrained_engine.generate(["a", "b"], [SamplingParams(), SamplingParams(regex="(a")])
    assert constrained_engine.stats().waiting == 0


def test_grammar_that_explodes_ends_one_request_only(constrained_engine: NativeEngine) -> None:
    params = [
        SamplingParams(regex="((a{1,1000}){1,1000}){1,1000}", max_tokens=60),
        SamplingParams(max_tokens=60, ignore_eos=True),
    ]
    bomb, free = constrained_engine.generate(["a", "b"], params)
    assert bomb.finish_reason == "error"
    assert "cannot follow its constraint" in str(bomb.error)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 60)


def test_bundled_model_writes_sql_of_a_shape() -> None:
    pytest.importorskip("llguidance", reason="needs the extra constrained")
    question = [{"role": "user", "content": "CREATE TABLE pets (name TEXT, age INTEGER)\n\nHow many pets are there?"}]
    engine = NativeEngine("burnish-sql-base", max_num_seqs=2)
    grammar = r'start: "SELECT " ("COUNT(*)" | "name") " FROM pets" (" WHERE age > " /[0-9]{1,2}/)?'
    [output] = engine.generate([question], SamplingParams(max_tokens=60, grammar=grammar))
    assert re.fullmatch(r"SELECT (COUNT\(\*\)|name) FROM pets( WHERE age > \d{1,2})?", output.text)
    assert output.finish_reason == "stop"


def test_transformers_engine_means_the_same_by_every_rule(tiny_model: Callable[[str], Any]) -> None:
    tiny = tiny_model("llama")
    params = [SamplingParams(max_tokens=12, **one) for one in RULES]
    prompts = [[5, 6, 7, 8]] * len(RULES)
    native = list(NativeEngine(tiny.folder, dtype="float32").generate(prompts, params))
    engine = TransformersEngine(tiny.folder, dtype="float32")
    assert all(close(one, other) for one, other in zip(native, engine.generate(prompts, params)))
    with pytest.raises(RequestError, match="does not know prompt_logprobs"):
        engine.generate(prompts[:1], SamplingParams(prompt_logprobs=0))
    with pytest.raises(RequestError, match="only one answer"):
        engine.generate(prompts[:1], SamplingParams(n=2))
