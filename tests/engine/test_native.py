"""The native engine gives transformers' tokens, whatever the batch, the blocks and what happens meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.engine.memory_budget import longest_window
from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, CheckpointError, ConfigError, RequestError
from burnish.models.decoder import Decoder
from burnish.models.loading import load_config

LONG = SamplingParams(max_tokens=20, ignore_eos=True)
MakePrompts = Callable[..., list[list[int]]]
Native = Callable[..., NativeEngine]


def tokens_of(outputs: Any) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def alone(engine: NativeEngine, prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    return [token_ids for prompt in prompts for token_ids in tokens_of(engine.generate([prompt], params))]


@pytest.mark.parametrize("eager", [False, True])
def test_greedy_equals_transformers_alone_and_batched(
    tiny: Any, native: Native, make_prompts: MakePrompts, eager: bool
) -> None:
    prompts = make_prompts(7, seed=1)
    expected = [tiny.greedy(prompt, 20) for prompt in prompts]
    assert len(set(expected)) > 3, "the test would prove nothing on constant answers"
    engine = native(tiny.folder, eager=eager, max_num_seqs=8, prefix_caching=False)
    assert alone(engine, prompts, LONG) == expected
    assert tokens_of(engine.generate(prompts, LONG)) == expected


@pytest.mark.parametrize("eager", [False, True])
def test_greedy_equals_transformers_with_few_places_and_pieces(
    tiny: Any, native: Native, make_prompts: MakePrompts, eager: bool
) -> None:
    prompts = make_prompts(7, seed=2)
    params = [SamplingParams(max_tokens=3 + 3 * index, ignore_eos=True) for index in range(7)]
    expected = [tiny.greedy(prompt, one.max_tokens) for prompt, one in zip(prompts, params)]
    engine = native(tiny.folder, eager=eager, max_num_seqs=3, max_batch_tokens=11)
    assert tokens_of(engine.generate(prompts, params)) == expected


@pytest.mark.parametrize("eager", [False, True])
def test_greedy_equals_transformers_when_blocks_run_out(
    tiny: Any, native: Native, make_prompts: MakePrompts, eager: bool
) -> None:
    shared = make_prompts(1, seed=21, shortest=36, longest=36)[0]
    prompts = [[*shared, *tail] for tail in make_prompts(6, seed=22, longest=8)]
    expected = [tiny.greedy(prompt, 20) for prompt in prompts]
    windowed = longest_window(load_config(tiny.folder)) is not None
    block_bytes = native(tiny.folder).scheduler.block_bytes
    engine = native(
        tiny.folder,
        eager=eager,
        max_model_len=68,
        max_batch_tokens=24,
        max_num_seqs=6,
        kv_memory=(4 if windowed else 7) * block_bytes,
    )
    assert tokens_of(engine.generate(prompts, LONG)) == expected
    stats = engine.stats()
    assert windowed or eager or stats.preemptions > 0
    assert windowed or stats.prefix_hit_tokens >= 32
    # Once more, with every prompt's beginning in the cache, and others that come and are aborted in between.
    decoys = [engine.submit(prompt[::-1], LONG) for prompt in prompts[:3]]
    outputs = engine.generate(prompts, LONG)
    found = [next(outputs)]
    for decoy in decoys:
        engine.step()
        engine.abort(decoy)
        engine.scheduler.check_integrity()
    assert tokens_of([*found, *outputs]) == expected
    assert engine.stats().kv_blocks_used == 0


def test_greedy_equals_transformers_without_cache(tiny: Any, make_prompts: MakePrompts) -> None:
    prompts = make_prompts(5, seed=3)
    engine = NativeEngine(tiny.folder, dtype="float32", max_num_seqs=3, max_batch_tokens=40, kv_cache=False)
    assert tokens_of(engine.generate(prompts, LONG)) == [tiny.greedy(prompt, 20) for prompt in prompts]
    assert engine.stats().kv_bytes == 0


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8"])
def test_smaller_cache_changes_little(
    tiny_model: Callable[[str], Any], native: Native, make_prompts: MakePrompts, kv_dtype: str
) -> None:
    tiny = tiny_model("llama")
    prompts = make_prompts(4, seed=4, shortest=20)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    # Read in pieces, so that later ones look at what the cache kept of earlier ones.
    full, small = (
        list(native(tiny.folder, kv_dtype=dtype, max_batch_tokens=5).generate(prompts, params))
        for dtype in ("float32", kv_dtype)
    )
    differences = [
        abs(mine.logprob - other.logprob)
        for one, two in zip(full, small)
        for mine, other in zip(one.prompt_logprobs[1:], two.prompt_logprobs[1:])
    ]
    assert 0 < sum(differences) / len(differences) < 0.05


class Oracle:
    """Guesses from known answers: right ones, or with a mistake at every fourth place."""

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]], *, right: bool) -> None:
        self.answers, self.right = answers, right

    def draft(self, sequences: Any) -> None:
        for sequence in sequences:
            done = len(sequence.token_ids)
            guess = list(self.answers[tuple(sequence.prompt_ids)][done : done + 5])
            if not self.right and len(guess) > 3:
                guess[3] = (guess[3] + 1) % 97
            sequence.drafts = guess

    def observe(self, num_rows: int, seconds: float) -> None: ...


@pytest.mark.parametrize("params", [LONG, SamplingParams(max_tokens=20, temperature=1.2, seed=5, ignore_eos=True)])
def test_drafts_save_steps_and_change_no_token(
    tiny_model: Callable[[str], Any], native: Native, make_prompts: MakePrompts, params: SamplingParams
) -> None:
    tiny = tiny_model("mistral")
    prompts = make_prompts(4, seed=9)
    engine = native(tiny.folder)
    expected = tokens_of(engine.generate(prompts, params))
    plain_steps = engine.stats().steps
    for right in (True, False):
        engine = native(tiny.folder)
        engine.drafter = Oracle({tuple(prompt): answer for prompt, answer in zip(prompts, expected)}, right=right)
        assert tokens_of(engine.generate(prompts, params)) == expected
        stats = engine.stats()
        assert stats.steps < plain_steps / (3 if right else 2)
        assert (stats.accepted_tokens == stats.drafted_tokens) is right


def test_several_answers_share_their_prompt(decoder: Decoder, make_prompts: MakePrompts) -> None:
    prompt = make_prompts(1, seed=10, shortest=40, longest=40)[0]
    engine = NativeEngine(decoder)
    hot = SamplingParams(max_tokens=8, temperature=1.3, seed=3, n=4, ignore_eos=True)
    [output] = engine.generate([prompt], hot)
    assert len(output.choices) == 4
    assert len({choice.token_ids for choice in output.choices}) == 4
    assert output.choices[0].token_ids == output.token_ids
    assert output.metrics.output_tokens == 32
    assert engine.stats().prefix_hit_tokens == 3 * 32
    [again] = engine.generate([prompt], hot)
    assert again.choices == output.choices
    with pytest.raises(RequestError, match="streamed"):
        engine.stream(prompt, hot)


def test_prompt_logprobs_are_the_models_own(decoder: Decoder, make_prompts: MakePrompts) -> None:
    prompt = make_prompts(1, seed=11, shortest=40, longest=40)[0]
    params = SamplingParams(max_tokens=3, prompt_logprobs=2, logprobs=1, ignore_eos=True)
    engine = NativeEngine(decoder, max_batch_tokens=7)
    for _ in range(2):
        [output] = engine.generate([prompt], params)
        tokens = [*prompt, *output.token_ids]
        with torch.no_grad():
            logprobs_TV = decoder(torch.tensor([tokens]))[0].log_softmax(-1)
        expected = [float(logprobs_TV[place, token]) for place, token in enumerate(tokens[1:])]
        found = [one.logprob for one in (*output.prompt_logprobs[1:], *output.logprobs)]
        assert output.prompt_logprobs[0] is None
        assert found == pytest.approx(expected, abs=1e-4)
        assert all(len(one.top) == 2 for one in output.prompt_logprobs[1:])


def test_step_events_show_every_token_of_submitted_requests(
    decoder: Decoder, tokenizer: Any, make_prompts: MakePrompts
) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer, max_num_seqs=2, speculation="off")
    prompts = make_prompts(3, seed=12)
    expected = list(engine.generate(prompts, LONG))
    ids = [engine.submit(prompt, LONG) for prompt in prompts]
    seen: dict[int, list[Any]] = {request_id: [] for request_id in ids}
    while engine.stats().running or engine.stats().waiting:
        for request_id, event in engine.step_events():
            seen[request_id].append(event)
    for request_id, output in zip(ids, expected):
        events = seen[request_id]
        assert [len(event.token_ids) for event in events] == [1] * 20
        assert "".join(event.text for event in events) == output.text
        assert events[-1].output.token_ids == output.token_ids


def test_greedy_equals_own_full_forward_without_packing(decoder: Decoder, make_prompts: MakePrompts) -> None:
    prompt = make_prompts(1, seed=4, shortest=9)[0]
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(60):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    engine = NativeEngine(decoder)
    [output] = engine.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True))
    assert list(output.token_ids) == tokens[len(prompt) :]
    assert engine.stats().packed_linears == 0


def test_equal_lengths_take_the_path_without_masks(tiny: Any) -> None:
    prompts = [[3 + index, 5, 7, 9 + index] for index in range(4)]
    engine = NativeEngine(tiny.folder, dtype="float32")
    assert tokens_of(engine.generate(prompts, LONG)) == [tiny.greedy(prompt, 20) for prompt in prompts]


def test_seed_gives_the_same_text_whatever_else_runs(decoder: Decoder, make_prompts: MakePrompts) -> None:
    prompts = make_prompts(6, seed=5)
    hot = SamplingParams(max_tokens=25, temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, seed=11, ignore_eos=True)
    engine = NativeEngine(decoder, max_num_seqs=4)
    [expected] = tokens_of(engine.generate([prompts[0]], hot))
    others = [SamplingParams(max_tokens=9 + index, temperature=0.9, seed=index) for index in range(5)]
    assert tokens_of(engine.generate(prompts, [hot, *others]))[0] == expected
    assert tokens_of(engine.generate(prompts[::-1], [*others, hot]))[-1] == expected
    different = SamplingParams(max_tokens=25, temperature=1.3, top_k=30, seed=12, ignore_eos=True)
    assert tokens_of(engine.generate([prompts[0]], different)) != [expected]


def test_unseeded_requests_differ(decoder: Decoder) -> None:
    engine = NativeEngine(decoder)
    params = SamplingParams(max_tokens=30, temperature=1.5, ignore_eos=True)
    first, second = tokens_of(engine.generate([[5, 6, 7]] * 2, params))
    assert first != second


def test_closing_generate_frees_slots(decoder: Decoder, make_prompts: MakePrompts) -> None:
    engine = NativeEngine(decoder, max_num_seqs=3)
    prompts = make_prompts(8, seed=6)
    expected = alone(engine, prompts, LONG)
    outputs = engine.generate(prompts, LONG)
    assert next(outputs).token_ids == expected[0]
    outputs.close()
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    assert tokens_of(engine.generate(prompts, LONG)) == expected


def test_closing_stream_frees_its_slot_and_leaves_others(
    decoder: Decoder, tokenizer: Any, make_prompts: MakePrompts
) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer, max_num_seqs=3)
    prompts = make_prompts(2, seed=7)
    expected = alone(engine, prompts, LONG)
    batch = engine.generate(prompts, LONG)
    stream = engine.stream([4, 5, 6], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    first = next(batch)
    assert engine.stats().running >= 1
    stream.close()
    assert [first.token_ids, *tokens_of(batch)] == expected
    assert engine.stats().running == 0


def test_abort_ends_a_request_at_once(decoder: Decoder) -> None:
    engine = NativeEngine(decoder, max_num_seqs=2)
    ids = [engine.submit([5, 6, index], SamplingParams(max_tokens=100, ignore_eos=True)) for index in range(3)]
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)
    engine.abort(ids[0])
    engine.abort(ids[2])
    engine.abort(999)
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    finished: list[RequestOutput] = []
    while not finished:
        finished = engine.step()
    assert [output.index for output in finished] == [ids[1]]
    assert engine.step() == []


def test_interrupted_step_loses_nothing(
    decoder: Decoder, make_prompts: MakePrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = NativeEngine(decoder, max_num_seqs=4)
    prompts = make_prompts(5, seed=8)
    expected = alone(engine, prompts, LONG)
    ids = {engine.submit(prompt, LONG): index for index, prompt in enumerate(prompts)}
    found: dict[int, tuple[int, ...]] = {}
    run, calls = engine.runner.run, itertools.count()

    def interrupted(batch: Any) -> None:
        run(batch)
        if next(calls) % 7 == 3:
            with torch.inference_mode():
                engine.runner.backend._store.keys[0].fill_(float("nan"))  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", interrupted)
    for _ in range(500):
        try:
            found |= {ids[output.index]: output.token_ids for output in engine.step()}
        except KeyboardInterrupt:
            engine.scheduler.check_integrity()
        if len(found) == len(prompts):
            break
    assert [found[index] for index in range(5)] == expected


def test_answer_that_ended_in_an_interrupted_step_is_reported_by_the_next(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = NativeEngine(decoder)
    [expected] = engine.generate([[5, 6]], SamplingParams(max_tokens=1))
    request_id = engine.submit([5, 6], SamplingParams(max_tokens=1))
    run = engine.runner.run

    def interrupted(batch: Any) -> None:
        run(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    [output] = engine.step()
    assert (output.index, output.token_ids) == (request_id, expected.token_ids)
    assert engine.step() == []


def test_end_token_stops_and_is_no_text(decoder: Decoder, tokenizer: Any) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer)
    [free] = engine.generate(["hello"], SamplingParams(max_tokens=30, ignore_eos=True))
    third = free.token_ids[3]
    cut = free.token_ids.index(third)
    [stopped] = engine.generate(["hello"], SamplingParams(max_tokens=30, stop_token_ids=[third], ignore_eos=True))
    assert stopped.token_ids == free.token_ids[: cut + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == tokenizer.decode(free.token_ids[:cut])
    assert free.finish_reason == "length"


def test_min_tokens_keeps_end_tokens_away(decoder: Decoder) -> None:
    engine = NativeEngine(decoder)
    [free] = engine.generate([[5, 6]], SamplingParams(max_tokens=12, ignore_eos=True))
    first = free.token_ids[0]
    params = SamplingParams(max_tokens=12, min_tokens=12, stop_token_ids=[first], ignore_eos=True)
    [output] = engine.generate([[5, 6]], params)
    assert first not in output.token_ids[:-1]
    assert len(output.token_ids) == 12


def test_stop_string_cuts_text_across_tokens(decoder: Decoder, tokenizer: Any) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer)
    [free] = engine.generate(["abc"], SamplingParams(max_tokens=40, ignore_eos=True))
    stop = free.text[8:11]
    assert len(stop) == 3
    cut = free.text.index(stop)
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop=[stop])
    [output] = engine.generate(["abc"], params)
    assert (output.text, output.finish_reason) == (free.text[:cut], "stop")
    events = list(engine.stream("abc", params))
    assert "".join(event.text for event in events) == output.text
    assert [event.output is None for event in events] == [True] * (len(events) - 1) + [False]
    assert sum((event.token_ids for event in events), ()) == output.token_ids


def test_stream_equals_generate(decoder: Decoder, tokenizer: Any) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer)
    params = SamplingParams(max_tokens=80, temperature=2.0, seed=1, ignore_eos=True)
    [output] = engine.generate(["abc"], params)
    events = list(engine.stream("abc", params))
    assert "".join(event.text for event in events) == output.text == tokenizer.decode(output.token_ids)
    assert "é" in output.text or "\ufffd" in output.text


def test_chat_messages_are_rendered(decoder: Decoder, tokenizer: Any) -> None:
    engine = NativeEngine(decoder, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    [output] = engine.generate([messages], LONG)
    assert output.prompt == "[user]hi[assistant]"
    assert tokens_of(engine.generate([tokenizer.encode(output.prompt)], LONG)) == [output.token_ids]


def test_metrics_add_up(decoder: Decoder) -> None:
    engine = NativeEngine(decoder)
    outputs = list(engine.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=10, ignore_eos=True)))
    for output in outputs:
        metrics = output.metrics
        assert (metrics.prompt_tokens, metrics.output_tokens) == (3, 10)
        assert metrics.ttft_ms is not None
        assert metrics.tpot_ms is not None
        assert len(metrics.itl_ms) == 9
        assert 0 < metrics.ttft_ms < metrics.e2e_ms
        assert metrics.ttft_ms + sum(metrics.itl_ms) == pytest.approx(metrics.e2e_ms)
        assert metrics.tpot_ms == pytest.approx((metrics.e2e_ms - metrics.ttft_ms) / 9)
    assert [output.index for output in outputs] == [0, 1, 2]


def test_stats_count_weights_and_cache(decoder: Decoder) -> None:
    engine = NativeEngine(decoder, max_num_seqs=4)
    assert engine.warm_up() > 0
    stats = engine.stats()
    assert stats.weights_bytes == 4 * decoder.config.num_parameters()
    assert stats.kv_bytes == 4 * 256 * decoder.config.kv_bytes_per_token(4)
    assert (stats.kv_blocks, stats.kv_blocks_used, stats.kv_bytes_used) == (64, 0, 0)
    assert (stats.prompt_tokens, stats.output_tokens) == (5 * 16, 5 * 4)
    assert 0 < stats.overhead_s < stats.step_s
    assert stats.tokens_per_s > 0
    assert stats.warmup_s > 0
    assert (stats.dtype, stats.device, stats.running, stats.waiting) == ("float32", "cpu", 0, 0)


def test_answer_ends_where_the_context_ends(decoder: Decoder) -> None:
    engine = NativeEngine(decoder, max_model_len=16)
    [output] = engine.generate([[5] * 10], SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[5] * 16], "16 tokens"),
        ([[]], "empty"),
        ([[5, 97]], "outside the vocabulary"),
        ([[5, -1]], "outside the vocabulary"),
        (["text"], "no tokenizer"),
        ([7], "wrong kind"),
        ([[5, "x"]], "mixes kinds"),
        ("text", "must be a list"),
    ],
)
def test_bad_prompt_is_refused_before_anything_runs(decoder: Decoder, prompts: Any, words: str) -> None:
    engine = NativeEngine(decoder, max_model_len=16)
    with pytest.raises(RequestError, match=words):
        engine.generate(prompts)
    assert engine.scheduler.idle


def test_parameters_must_match_prompts_in_number(decoder: Decoder) -> None:
    engine = NativeEngine(decoder)
    with pytest.raises(RequestError, match="differ in number"):
        engine.generate([[5]], [SamplingParams(), SamplingParams()])


def test_bad_options_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        NativeEngine(decoder, max_num_seqs=0)
    with pytest.raises(RequestError, match="max_model_len"):
        NativeEngine(decoder, max_model_len=100_000)
    with pytest.raises(ConfigError, match="keeps its dtype"):
        NativeEngine(decoder, dtype="bfloat16")


def test_missing_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        NativeEngine(tmp_path / "nothing-here")


def test_nan_logits_are_an_error_not_a_token(decoder: Decoder) -> None:
    with torch.no_grad():
        decoder.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BurnishError, match="NaN"):
        list(NativeEngine(decoder).generate([[5, 6]]))


def test_real_story_equals_its_readme(shared_data: Path) -> None:
    engine = NativeEngine(shared_data / "models" / "stories260k", dtype="float32", kv_cache=True)
    [output] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=100))
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert ("Once upon a time" + output.text).startswith(story)
    pieces = [event.text for event in engine.stream("Once upon a time", SamplingParams(max_tokens=100))]
    assert "".join(pieces) == output.text
    assert len(pieces) > 20
