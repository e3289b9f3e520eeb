"""A benchmark counts every token, times what it says, and refuses half an answer. Nothing here judges speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from measure_fakes import VOCAB, ScriptedEngine, make_decoder

from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, ConfigError
from burnish.measure.bench import BenchResult, Workload, run_bench, run_versus
from burnish.measure.hardware import hardware_record, version_record

PROMISED = {
    "model",
    "engine",
    "dtype",
    "quantization",
    "device",
    "threads",
    "num_requests",
    "input_tokens",
    "output_tokens",
    "concurrency",
    "load_s",
    "warmup_s",
    "wall_s",
    "total_tokens_per_s",
    "output_tokens_per_s",
    "ttft_ms",
    "tpot_ms",
    "peak_memory_bytes",
    "weights_bytes",
    "kv_bytes",
    "repeats",
    "spread",
    "optimise_s",
    "hardware",
}


def engine(seed: int = 0) -> NativeEngine:
    return NativeEngine(make_decoder(seed), max_num_seqs=4)


@pytest.fixture(scope="module")
def result() -> BenchResult:
    workload = Workload(input_tokens=7, output_tokens=5, concurrency=3, num_requests=8)
    return run_bench(engine(), workload, model="tiny", repeats=3, warmup=1)


def test_result_has_every_promised_field(result: BenchResult) -> None:
    record = result.to_dict()
    assert record.keys() >= PROMISED
    assert set(record["ttft_ms"]) == set(record["tpot_ms"]) == {"p50", "p90", "p99"}
    assert (record["model"], record["engine"], record["quantization"]) == ("tiny", "native", None)


def test_tokens_are_counted_exactly_and_rates_follow_from_them(result: BenchResult) -> None:
    assert (result.num_requests, result.repeats, len(result.runs)) == (8, 3, 3)
    for run in result.runs:
        assert (run.input_tokens, run.output_tokens) == (56, 40)
        assert len(run.ttft_ms) == len(run.tpot_ms) == len(run.e2e_ms) == 8
        assert run.total_tokens_per_s == pytest.approx(96 / run.wall_s)
    rates = sorted(run.output_tokens_per_s for run in result.runs)
    assert result.output_tokens_per_s == rates[1]
    assert result.spread["output_tokens_per_s"] == (rates[0], rates[2])
    assert result.wall_s == sorted(run.wall_s for run in result.runs)[1]


def test_memory_and_times_are_set(result: BenchResult) -> None:
    assert result.weights_bytes > 4 * VOCAB * 24
    assert result.kv_bytes > 0
    assert result.peak_memory_bytes > result.weights_bytes
    assert result.warmup_s > 0
    assert result.ttft_ms["p50"] is not None
    assert result.ttft_ms["p50"] <= result.ttft_ms["p90"] <= result.ttft_ms["p99"]  # type: ignore[operator]


def test_growth_is_counted_from_the_baseline_that_is_given() -> None:
    workload = Workload(input_tokens=3, output_tokens=2)
    found = run_bench(engine(), workload, repeats=1, warmup=0, baseline_bytes=0)
    assert found.memory_growth_bytes == found.peak_memory_bytes


def test_one_output_token_has_no_time_per_token() -> None:
    found = run_bench(engine(), Workload(input_tokens=3, output_tokens=1), repeats=1, warmup=0)
    assert found.tpot_ms == {"p50": None, "p90": None, "p99": None}


def test_prompts_are_seeded_and_within_the_vocabulary() -> None:
    workload = Workload(input_tokens=20, concurrency=4)
    prompts = workload.prompts(10)
    assert prompts == workload.prompts(10)
    assert prompts != replace(workload, seed=1).prompts(10)
    assert prompts != workload.prompts(10, turn=1) == workload.prompts(10, turn=1)
    assert {len(prompt) for prompt in prompts} == {20}
    assert set().union(*prompts) <= set(range(10))
    assert len(prompts) == workload.requests == 4


def test_requests_go_out_as_many_at_a_time_as_asked() -> None:
    sizes: list[int] = []

    class Watched(ScriptedEngine):
        vocab_size = 9

        def generate(self, prompts: Sequence[Any], params: SamplingParams) -> Iterator[RequestOutput]:
            sizes.append(len(prompts))
            assert params.ignore_eos
            for output in super().generate(prompts, params):
                metrics = replace(output.metrics, output_tokens=params.max_tokens)
                yield replace(output, metrics=metrics)

    seen: list[tuple[int, int]] = []
    run_bench(
        Watched({}),
        Workload(input_tokens=2, output_tokens=2, concurrency=3, num_requests=7),
        repeats=2,
        on_progress=lambda *place: seen.append(place),
    )
    assert sizes == [3, 3, 1] * 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_pass_finds_its_prompts_in_the_cache() -> None:
    measured = engine()
    run_bench(measured, Workload(input_tokens=40, output_tokens=4, concurrency=4), repeats=3, warmup=1)
    assert measured.stats().prefix_hit_tokens == 0


def test_an_answer_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(BurnishError, match="did not answer the workload in full"):
        run_bench(ScriptedEngine({}), Workload(input_tokens=2, output_tokens=2), vocab_size=5)


def test_a_workload_that_does_not_fit_the_context_is_refused_before_it_runs() -> None:
    with pytest.raises(ConfigError, match="at most 64"):
        run_bench(engine(), Workload(input_tokens=60, output_tokens=5))


@pytest.mark.parametrize("wrong", [{"input_tokens": 0}, {"concurrency": -1}, {"num_requests": 0}])
def test_a_workload_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        Workload(**wrong)


def test_two_engines_run_in_turn_on_the_same_prompts() -> None:
    turns: list[tuple[str, list[list[int]]]] = []

    class Named(NativeEngine):
        def generate(self, prompts: Any, params: Any = None) -> Iterator[RequestOutput]:
            turns.append((self.label, prompts))
            return super().generate(prompts, params)

    first, second = Named(make_decoder(0)), Named(make_decoder(1))
    first.label, second.label = "a", "b"  # type: ignore[attr-defined]
    found = run_versus(first, second, Workload(input_tokens=4, output_tokens=3), repeats=2, warmup=1)
    assert [label for label, _ in turns] == ["a", "b"] * 3
    assert all(one[1] == other[1] for one, other in zip(turns[::2], turns[1::2]))
    assert len({str(prompts) for _, prompts in turns}) == 3
    pairs = [a.wall_s / b.wall_s for a, b in zip(found.first.runs, found.second.runs)]
    assert found.ratio["wall_s"] == pytest.approx(sum(pairs) / 2)
    assert found.ratio_spread["wall_s"] == (min(pairs), max(pairs))
    assert found.to_dict()["first"]["repeats"] == 2


def test_hardware_names_the_processor_but_neither_machine_nor_user() -> None:
    record = hardware_record()
    assert record["cores"] >= 1
    assert record["memory_bytes"] > 0
    assert record["cpu"]
    assert {"hostname", "user"}.isdisjoint(record)
    assert {"python", "torch", "burnish"} <= version_record().keys()
