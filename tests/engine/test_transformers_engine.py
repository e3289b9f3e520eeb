"""The reference engine: same protocol, same meaning of the parameters, transformers' own answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from burnish.engine.native import NativeEngine
from burnish.engine.protocol import make_engine
from burnish.engine.sampling import SamplingParams
from burnish.engine.transformers_engine import TransformersEngine
from burnish.errors import CheckpointError, ConfigError, RequestError

LONG = SamplingParams(max_tokens=15, ignore_eos=True)
MakePrompts = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Any]) -> Any:
    return tiny_model("llama").folder


def test_greedy_equals_native_and_generate(tiny_model: Callable[[str], Any], make_prompts: MakePrompts) -> None:
    tiny = tiny_model("llama")
    prompts = make_prompts(5, seed=1)
    engine = TransformersEngine(tiny.folder, dtype="float32", max_num_seqs=3)
    outputs = list(engine.generate(prompts, LONG))
    assert [output.token_ids for output in outputs] == [tiny.greedy(prompt, 15) for prompt in prompts]
    native = NativeEngine(tiny.folder, dtype="float32", backend="torch")
    assert [output.token_ids for output in native.generate(prompts, LONG)] == [one.token_ids for one in outputs]
    for output in outputs:
        assert output.metrics.ttft_ms is not None
        assert len(output.metrics.itl_ms) == 14
    stats = engine.stats()
    assert stats.kv_bytes > 0
    # Its frequencies of the rotary positions are buffers; ours are no part of the model.
    assert 0 <= stats.weights_bytes - native.stats().weights_bytes < 100


def test_sampling_and_penalties_equal_native(folder: Any, make_prompts: MakePrompts) -> None:
    prompts = make_prompts(3, seed=2)
    params = [
        SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=7, repetition_penalty=1.5, ignore_eos=True),
        SamplingParams(max_tokens=9, min_tokens=9),
    ]
    engines = [TransformersEngine(folder, dtype="float32"), NativeEngine(folder, dtype="float32")]
    reference, ours = ([output.token_ids for output in engine.generate(prompts, params)] for engine in engines)
    assert reference == ours
    assert [len(token_ids) for token_ids in ours] == [12, 7, 9]


def test_stream_equals_generate_and_may_be_closed(folder: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(folder, dtype="float32", tokenizer=tokenizer)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    [output] = engine.generate(["abc"], params)
    events = list(engine.stream("abc", params))
    assert "".join(event.text for event in events) == output.text
    assert events[-1].output is not None
    assert events[-1].output.token_ids == output.token_ids
    stream = engine.stream("abc", params)
    next(stream)
    stream.close()
    assert engine.stats().running == 0


def test_stop_string_ends_the_row(folder: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(folder, dtype="float32", tokenizer=tokenizer)
    [free] = engine.generate(["abc"], LONG)
    stop = free.text[4:6]
    [output] = engine.generate(["abc"], SamplingParams(max_tokens=15, ignore_eos=True, stop=[stop]))
    assert output.text == free.text[: free.text.index(stop)]
    assert output.finish_reason == "stop"


def test_without_cache_the_tokens_are_the_same(folder: Any) -> None:
    [cached] = make_engine(folder, engine="transformers", dtype="float32").generate([[5, 6, 7]], LONG)
    [plain] = make_engine(folder, engine="transformers", dtype="float32", kv_cache=False).generate([[5, 6, 7]], LONG)
    assert cached.token_ids == plain.token_ids


def test_warm_up_is_timed(folder: Any) -> None:
    engine = make_engine(folder, engine="transformers", dtype="float32")
    assert engine.warm_up() == engine.stats().warmup_s > 0


def test_too_long_prompt_is_refused(folder: Any) -> None:
    with pytest.raises(RequestError, match="96 tokens"):
        TransformersEngine(folder, dtype="float32").generate([[5] * 96])


def test_folder_without_weights_is_a_checkpoint_error(tmp_path: Any, folder: Any) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        TransformersEngine(tmp_path)


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="native, transformers"):
        make_engine("x", engine="vroom")
