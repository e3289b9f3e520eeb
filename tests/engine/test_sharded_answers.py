"""Several processes answer as one does: every family, quantized weights, and everything the scheduler can do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eager_drafter import EagerDrafter
from sharded_groups import Groups

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.quantize import quantize_model
from burnish.engine.native import NativeEngine
from burnish.engine.outputs import EngineStats, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import save_decoder

PAIRS = ((2, 1), (1, 2))
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()


def prompts(seed: int, vocab: int = 96, lengths: tuple[int, ...] = (3, 17, 26, 9)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def run(
    model: Path, given: list[list[int]], params: SamplingParams = GREEDY, *, eager: bool = False, **options: Any
) -> tuple[list[RequestOutput], EngineStats]:
    """Answers and figures of an engine on torch, over one process or over a group's."""
    settings = {"max_num_seqs": 3, "max_batch_tokens": 20, "max_model_len": 48, **options}
    engine = NativeEngine(
        model, **{"dtype": "float32", "backend": "torch", "threads": 1, "speculation": "off", **settings}
    )
    engine.drafter = EagerDrafter() if eager else None
    try:
        outputs = list(engine.generate(given, params))
        engine.scheduler.check_integrity()
        return outputs, engine.stats()
    finally:
        engine.close()


def ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def small_decoder(**fields: Any) -> Decoder:
    config = ModelConfig(
        **{
            "family": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 16,
            "rotary_dim": 16,
            "max_position_embeddings": 256,
            **fields,
        }
    )
    return Decoder(config).initialize(std=0.3, seed=4).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, four kv heads, an embedding that is no small part: sizes that divide."""
    folder = tmp_path_factory.mktemp("small")
    save_decoder(small_decoder(), folder, source=None)
    return folder


@pytest.mark.parametrize("ways", PAIRS)
def test_every_family_answers_as_in_one_process(ways: tuple[int, int], tiny: Any, groups: Groups) -> None:
    given = prompts(sum(map(ord, tiny.name)))
    alone, _ = run(tiny.folder, given)
    together, stats = run(tiny.folder, given, shards=groups(*ways))
    assert ids(together) == ids(alone)
    assert (stats.tensor_parallel, stats.pipeline_parallel) == ways
    assert len(stats.ranks) == 2


def test_both_ways_at_once_answer_as_in_one_process(small: Path, tiny_model: Any) -> None:
    groups = Groups()
    try:
        for folder in (small, tiny_model("gpt2").folder):
            given = prompts(5)
            assert ids(run(folder, given, shards=groups(2, 2))[0]) == ids(run(folder, given)[0])
    finally:
        groups.close()


@pytest.mark.parametrize("ways", PAIRS)
def test_each_rank_holds_and_reads_at_most_60_percent(small: Path, ways: tuple[int, int], groups: Groups) -> None:
    _, alone = run(small, prompts(1))
    engine = NativeEngine(small, dtype="float32", threads=1, max_num_seqs=3, max_model_len=48, shards=groups(*ways))
    whole = alone.weights_bytes + alone.kv_bytes
    for rank in engine.stats().ranks:
        assert 0.4 * whole < rank.weights_bytes + rank.kv_bytes <= 0.6 * whole
        assert rank.kv_bytes == alone.kv_bytes // 2
    loaded = engine.runner.backend.loaded  # type: ignore[attr-defined]
    for each in loaded:
        assert each.bytes_read <= 0.6 * alone.weights_bytes
    assert sum(each.bytes_read for each in loaded) >= alone.weights_bytes
    engine.close()


@pytest.mark.parametrize("ways", PAIRS)
def test_scheduler_decides_as_in_one_process(small: Path, ways: tuple[int, int], groups: Groups) -> None:
    given = prompts(2, lengths=(30, 21, 14, 9))
    given += [[*given[0], 7, 8], [*given[0][:20], 9]]
    cache = 9 * 16 * 2 * 4 * 4 * 16 * 4  # nine blocks: sequences have to give theirs back
    options: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64, "max_batch_tokens": 16}
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    alone, one = run(small, given, params, kv_memory=cache, **options)
    together, two = run(small, given, params, kv_memory=cache // 2, shards=groups(*ways), **options)
    assert ids(together) == ids(alone)
    assert one.preemptions > 0
    assert one.prefix_hit_tokens > 0
    for field in ("kv_blocks", "preemptions", "prefix_hit_tokens", "steps", "output_tokens", "kv_bytes"):
        assert getattr(two, field) == getattr(one, field), field


@pytest.mark.parametrize("ways", PAIRS)
def test_sampling_logprobs_and_guesses_are_those_of_one_process(
    small: Path, ways: tuple[int, int], groups: Groups
) -> None:
    given = [[5, 6, 7, 8] * 5, *prompts(3)]
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.8, top_p=0.9, seed=11, logprobs=2)
    alone, _ = run(small, given, params)
    together, _ = run(small, given, params, shards=groups(*ways))
    assert ids(together) == ids(alone)
    for ours, theirs in zip(together, alone):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert [one.logprob for one in ours.logprobs] == pytest.approx(
            [one.logprob for one in theirs.logprobs], abs=1e-4
        )
    guessed, stats = run(small, given, eager=True, shards=groups(*ways))
    assert ids(guessed) == ids(run(small, given)[0])
    assert stats.drafted_tokens > 0


def test_long_prompts_pass_the_stages_in_pieces(small: Path, groups: Groups) -> None:
    given = prompts(6, lengths=(150, 140, 3, 77))
    options: dict[str, Any] = {"max_batch_tokens": 256, "max_model_len": 200}
    alone, _ = run(small, given, **options)
    assert ids(run(small, given, shards=groups(1, 2), **options)[0]) == ids(alone)


def test_a_stage_of_windowed_blocks_keeps_what_the_others_need(tiny_model: Any, groups: Groups) -> None:
    folder = tiny_model("gemma3").folder
    given = prompts(12, lengths=(70, 61, 8))
    options: dict[str, Any] = {"max_model_len": 96, "max_batch_tokens": 16}
    alone, one = run(folder, given, **options)
    together, two = run(folder, given, shards=groups(1, 2), **options)
    assert ids(together) == ids(alone)
    assert two.kv_blocks == one.kv_blocks


@pytest.mark.parametrize("ways", PAIRS)
def test_without_a_cache_and_with_small_ones(small: Path, ways: tuple[int, int], groups: Groups) -> None:
    given = prompts(7)
    ways_to_keep: tuple[dict[str, Any], ...] = ({"kv_cache": False}, {"kv_dtype": "int8"})
    for options in ways_to_keep:
        alone, _ = run(small, given, **options)
        assert ids(run(small, given, shards=groups(*ways), **options)[0]) == ids(alone)


def test_an_aborted_request_frees_its_blocks_and_others_go_on(small: Path, groups: Groups) -> None:
    given = prompts(8)
    engine = NativeEngine(small, dtype="float32", threads=1, max_num_seqs=3, max_model_len=48, shards=groups(2, 1))
    first = engine.submit(given[0], GREEDY)
    second = engine.submit(given[1], GREEDY)
    engine.step()
    engine.abort(first)
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert outputs[0].index == second
    assert outputs[0].token_ids == ids(run(small, given[1:2])[0])[0]
    assert engine.stats().kv_blocks_used == 0
    engine.close()


@pytest.mark.parametrize("ways", PAIRS)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_rounded_while_loading_answers_as_in_one_process(
    small: Path, quantize: str, ways: tuple[int, int], groups: Groups
) -> None:
    given = prompts(9)
    options: dict[str, Any] = {"quantize": quantize, "weights_cache": False}
    alone, one = run(small, given, **options)
    together, two = run(small, given, shards=groups(*ways), **options)
    assert ids(together) == ids(alone)
    assert max(rank.weights_bytes for rank in two.ranks) <= 0.6 * one.weights_bytes


@pytest.mark.parametrize("ways", PAIRS)
@pytest.mark.parametrize(
    ("bits", "group_size", "ordered"), [(4, 32, False), (4, 32, True), (8, -1, False), (3, 48, False)]
)
def test_packed_folders_answer_as_in_one_process(
    bits: int, group_size: int, ordered: bool, ways: tuple[int, int], groups: Groups, tmp_path: Path
) -> None:
    child = small_decoder()
    config = QuantizeConfig(bits=bits, group_size=group_size, activation_order=ordered)
    quantize_model(child, prompts(10, lengths=(40, 40, 40, 40)), config)
    save_quantized(child, tmp_path, source=None, config=config)
    given = prompts(11)
    alone, one = run(tmp_path, given)
    together, two = run(tmp_path, given, shards=groups(*ways))
    assert ids(together) == ids(alone)
    assert max(rank.weights_bytes for rank in two.ranks) <= 0.6 * one.weights_bytes
