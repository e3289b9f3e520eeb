from __future__ import annotations

from pathlib import Path

import pytest

from burnish.compress.config import QuantizeConfig
from burnish.errors import ConfigError
from burnish.measure.bench import BenchResult, VersusResult, Workload
from burnish.measure.compare import GateLimits
from burnish.pipeline.bench import bench
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import EngineOptions, Source
from burnish.pipeline.quantize import quantize
from burnish.pipeline.tune import TuneRecord

SMALL = Workload(input_tokens=8, output_tokens=4, concurrency=2)


def test_all_requests_are_timed(merged: MergeRecord) -> None:
    result = bench(merged.out, workload=SMALL, repeats=2, source=Source(dtype="float32"))
    assert isinstance(result, BenchResult)
    assert (result.num_requests, result.repeats, result.engine) == (2, 2, "native")
    assert result.quantization is None
    assert result.total_tokens_per_s == pytest.approx(3 * result.output_tokens_per_s)
    assert result.peak_memory_bytes > 0


def test_quantized_model_is_named_as_such(merged: MergeRecord, tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", bits=8, group_size=16)
    quantize(merged.out, out=tmp_path / "q8", config=config, limits=GateLimits())
    result = bench(str(tmp_path / "q8"), workload=SMALL, repeats=1, warmup=0)
    assert isinstance(result, BenchResult)
    assert result.quantization == "gptq-8bit"


def test_adapter_runs_unmerged(tuned: TuneRecord) -> None:
    result = bench(tuned.adapter, workload=SMALL, repeats=1, warmup=0)
    assert isinstance(result, BenchResult)
    assert result.quantization is None


def test_two_engines_run_in_turn(merged: MergeRecord) -> None:
    result = bench(merged.out, workload=SMALL, versus="transformers", repeats=2, source=Source(dtype="float32"))
    assert isinstance(result, VersusResult)
    assert (result.first.engine, result.second.engine) == ("native", "transformers")
    assert result.ratio["total_tokens_per_s"] > 0


@pytest.mark.parametrize("numbers", [{"repeats": 0}, {"warmup": -1}])
def test_repeats_out_of_range_are_refused(tiny: Path, numbers: dict) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        bench(str(tiny), workload=SMALL, **numbers)


def test_quantized_on_load_beside_the_same_engine_dense(merged: MergeRecord) -> None:
    result = bench(merged.out, workload=SMALL, versus="native", repeats=1, options=EngineOptions(quantize="int8"))
    assert isinstance(result, VersusResult)
    assert (result.first.quantization, result.second.quantization) == ("int8", None)
    assert result.first.weights_bytes < result.second.weights_bytes
    record = result.to_dict()["first"]["optimised"]
    assert record["quantize"] == "int8"
    assert record["bytes_after"] < record["bytes_before"]


def test_the_other_engine_may_run_another_model(merged: MergeRecord, tiny: Path) -> None:
    result = bench(
        merged.out, workload=SMALL, versus="native", versus_model=str(tiny), versus_quantize="int4", repeats=1
    )
    assert isinstance(result, VersusResult)
    assert (result.first.quantization, result.second.quantization) == (None, "int4")
    with pytest.raises(ConfigError, match="no other engine"):
        bench(merged.out, workload=SMALL, versus_quantize="int8")


def test_an_engine_that_cannot_honour_an_option_is_refused(merged: MergeRecord) -> None:
    with pytest.raises(ConfigError, match="cannot honour quantize"):
        bench(merged.out, workload=SMALL, versus="transformers", versus_quantize="int8")
