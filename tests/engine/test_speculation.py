"""Guessing saves steps and changes no answer: greedy, drawn, constrained, stopped, preempted or aborted."""

from __future__ import annotations

import random
from typing import Any

import pytest
from eager_drafter import EagerDrafter
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

VOCAB = 97


def tiny_decoder(seed: int) -> Decoder:
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=1 + seed % 2, num_heads=2,
        num_kv_heads=1, head_dim=8, rotary_dim=8, max_position_embeddings=192, eos_ids=(2,),
    )  # fmt: skip
    return Decoder(config).initialize(std=0.5, seed=seed).eval()


def engines(decoder: Decoder, **options: Any) -> tuple[NativeEngine, NativeEngine]:
    """One that never guesses, and one that guesses whenever it can."""
    plain = NativeEngine(decoder, speculation="off", **options)
    guessing = NativeEngine(decoder, speculation="ngram", **options)
    guessing.drafter = EagerDrafter()
    return plain, guessing


def shown(outputs: Any) -> list[tuple[Any, ...]]:
    """All that does not depend on time."""
    return [(one.text, one.token_ids, one.finish_reason, one.choices, one.prompt_logprobs) for one in outputs]


def repetitive(seed: int, *, length: int = 40) -> list[int]:
    source = random.Random(seed)
    phrase = [source.randrange(3, VOCAB) for _ in range(source.randrange(2, 9))]
    return [
        token_id if source.random() < 0.9 else source.randrange(3, VOCAB) for token_id in (phrase * length)[:length]
    ]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(7, 40), st.integers(6, 30))
@settings(max_examples=25, deadline=None)
def test_greedy_answers_are_the_same_on_many_models(seed: int, count: int, pieces: int, blocks: int) -> None:
    decoder = tiny_decoder(seed)
    plain = NativeEngine(decoder, speculation="off", max_num_seqs=count)
    memory = blocks * plain.scheduler.block_bytes
    guessing = NativeEngine(decoder, max_num_seqs=3, max_batch_tokens=pieces, kv_memory=memory, max_model_len=96)
    guessing.drafter = EagerDrafter()
    prompts = [repetitive(seed + index, length=10 + 7 * index) for index in range(count)]
    params = [SamplingParams(max_tokens=12 + 9 * index, ignore_eos=index % 2 == 0) for index in range(count)]
    expected = [one.token_ids for one in plain.generate(prompts, params)]
    assert [one.token_ids for one in guessing.generate(prompts, params)] == expected
    guessing.scheduler.check_integrity()
    assert guessing.stats().kv_blocks_used == 0


CASES: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 0.7, "seed": 3},
    "drawn-top-p": {"temperature": 1.1, "seed": 4, "top_p": 0.7, "top_k": 9},
    "several": {"temperature": 0.8, "seed": 5, "n": 3},
    "penalised": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "late-end": {"min_tokens": 25, "max_tokens": 30},
    "biased": {"logit_bias": {5: 2.0, 6: -3.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_whatever_is_asked(decoder: Decoder, case: str) -> None:
    plain, guessing = engines(decoder)
    prompts = [repetitive(seed) for seed in range(6)]
    params = SamplingParams(**{"max_tokens": 40, **CASES[case]})
    expected = list(plain.generate(prompts, params))
    found = list(guessing.generate(prompts, params))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for mine, theirs in zip(found, expected):
        assert [choice.token_ids for choice in mine.choices] == [choice.token_ids for choice in theirs.choices]
        if mine.logprobs is not None and theirs.logprobs is not None:
            pairs = zip(mine.logprobs, theirs.logprobs)
            assert all(one.logprob == pytest.approx(other.logprob, abs=1e-4) for one, other in pairs)
    assert guessing.stats().drafted_tokens > 0


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9, "seed": 6}])
def test_constrained_answers_are_the_same(drawn: dict[str, Any]) -> None:
    pytest.importorskip("llguidance", reason="needs the extra constrained")
    folder = bundled_path("burnish-sql-base")
    plain, guessing = engines(load_decoder(folder), tokenizer=Tokenizer.load(folder))
    params = SamplingParams(
        regex="(SELECT name FROM people, |SELECT age FROM people, ){4,6}END", max_tokens=90, **drawn
    )
    prompts = ["SELECT name FROM people, SELECT age FROM people, SELECT name", "people"]
    assert shown(guessing.generate(prompts, params)) == shown(plain.generate(prompts, params))
    assert guessing.stats().accepted_tokens > 20


def test_stop_string_inside_accepted_tokens_ends_the_answer_there(decoder: Decoder, tokenizer: Any) -> None:
    plain, guessing = engines(decoder, tokenizer=tokenizer)
    [free] = plain.generate(["abcabcabcabc"], SamplingParams(max_tokens=60, ignore_eos=True))
    drafted = 0
    for begin in range(0, 40, 3):
        params = SamplingParams(max_tokens=60, ignore_eos=True, stop=[free.text[begin : begin + 3]])
        before = guessing.stats()
        assert shown(guessing.generate(["abcabcabcabc"], params)) == shown(plain.generate(["abcabcabcabc"], params))
        after = guessing.stats()
        drafted += after.drafted_tokens - before.drafted_tokens
        events = list(guessing.stream("abcabcabcabc", params))
        assert "".join(event.text for event in events) == events[-1].output.text  # type: ignore[union-attr]
        assert after.kv_blocks_used == 0
    assert drafted > 0


def test_an_answer_never_has_more_than_max_tokens(decoder: Decoder) -> None:
    plain, guessing = engines(decoder)
    for count in range(1, 25):
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        [expected] = plain.generate([[5, 6] * 8], params)
        [found] = guessing.generate([[5, 6] * 8], params)
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, "length")


def test_drawn_tokens_keep_their_distribution(decoder: Decoder) -> None:
    _, guessing = engines(decoder)
    prompt = [5, 6, 7, 5, 7, 6, 6, 5, 5, 7, 7]
    # Four tokens only: nearly every pair was seen before.
    base = SamplingParams(max_tokens=6, temperature=1.5, ignore_eos=True, logit_bias=dict.fromkeys((5, 6, 7, 8), 60.0))
    counts: list[dict[int, int]] = [{}, {}]
    for which, eager in enumerate((False, True)):
        guessing.drafter = EagerDrafter() if eager else None
        params = [SamplingParams(**{**vars(base), "seed": 1000 * which + index}) for index in range(600)]
        for output in guessing.generate([prompt] * 600, params):
            last = output.token_ids[-1]
            counts[which][last] = counts[which].get(last, 0) + 1
    assert guessing.stats().drafted_tokens > 300
    likely = [token_id for token_id, count in counts[0].items() if count >= 30]
    assert len(likely) > 1
    for token_id in likely:
        expected = counts[0][token_id]
        assert abs(counts[1].get(token_id, 0) - expected) < 5 * (2 * expected) ** 0.5


def test_thousand_random_requests_leave_no_block_behind() -> None:
    decoder = tiny_decoder(1)
    bytes_of_block = NativeEngine(decoder, max_num_seqs=2).scheduler.block_bytes
    engine = NativeEngine(
        decoder, max_num_seqs=6, max_batch_tokens=29, kv_memory=14 * bytes_of_block, max_model_len=112
    )
    engine.drafter = EagerDrafter()
    source = random.Random(0)
    pending: set[int] = set()
    finished: list[RequestOutput] = []
    for index in range(1000):
        params = SamplingParams(
            max_tokens=source.randrange(1, 30),
            temperature=source.choice([0.0, 0.5]),
            ignore_eos=source.random() < 0.5,
            stop_token_ids=[source.randrange(VOCAB)],
        )
        pending.add(engine.submit(repetitive(index % 50, length=source.randrange(1, 60)), params))
        for _ in range(source.randrange(4)):
            done = engine.step()
            finished += done
            pending -= {output.index for output in done}
        if pending and source.random() < 0.2:
            engine.abort(victim := source.choice(sorted(pending)))
            pending.discard(victim)
        if index % 20 == 0:
            engine.scheduler.check_integrity()
    while pending:
        done = engine.step()
        finished += done
        pending -= {output.index for output in done}
    engine.scheduler.check_integrity()
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)
    # How much is guessed, and so how often room runs out, depends on the clock.
    assert stats.accepted_tokens > 0
    assert len(finished) > 500


def test_guesses_take_no_block_from_another_sequence(decoder: Decoder) -> None:
    block_bytes = NativeEngine(decoder).scheduler.block_bytes
    prompts = [[5, 6] * 12, [7, 8] * 12]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    counts = []
    for eager in (False, True):
        engine = NativeEngine(
            decoder, kv_memory=4 * block_bytes, max_model_len=40, prefix_caching=False, speculation="off"
        )
        engine.drafter = EagerDrafter() if eager else None
        list(engine.generate(prompts, params))
        counts.append(engine.stats().preemptions)
    assert counts == [0, 0]


def test_measured_engine_guesses_by_itself_and_tells_so(decoder: Decoder) -> None:
    engine = NativeEngine(decoder)
    plain = NativeEngine(decoder, speculation="off")
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    assert shown(engine.generate([[5, 6] * 10], params)) == shown(plain.generate([[5, 6] * 10], params))
    stats = engine.stats()
    assert stats.speculation == "auto"
    assert stats.saved_steps == stats.accepted_tokens > 0
    assert stats.steps == 1 + 199 - stats.saved_steps
    assert (plain.stats().speculation, plain.stats().drafted_tokens) == ("off", 0)


def test_bad_speculation_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="unknown speculation"):
        NativeEngine("nothing-here", speculation="always")
    with pytest.raises(ConfigError, match="needs the KV cache"):
        NativeEngine("nothing-here", speculation="ngram", kv_cache=False)
