from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_fakes import logits_of, read_manifest_of

from burnish.compress.config import QuantizeConfig
from burnish.errors import BurnishError, ConfigError, DataError, GateError
from burnish.measure.compare import GateLimits
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import MergeRecord, merge
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.quantize import quantize
from burnish.pipeline.tune import TuneRecord, tune
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig

NO_LIMITS = GateLimits()
TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_eight_bits_pass_their_gate(merged: MergeRecord, rows_file: Path, tmp_path: Path, method: str) -> None:
    record = quantize(
        merged.out, out=tmp_path / "q8", config=QuantizeConfig(method=method, bits=8, group_size=16), limits=NO_LIMITS
    )
    assert record.gate.kl_mean < 1e-3
    assert (record.method, record.bits, record.group_size) == (method, 8, 16)
    assert len(record.layers) == 14
    assert all(layer.error < 0.02 for layer in record.layers)
    assert 8 < record.bits_per_weight < 12
    assert record.seconds > 0
    assert record.disk_bytes > 0
    assert record.calibration_source == (str(rows_file) if method == "gptq" else None)
    assert (record.calibration_tokens > 0) == (method == "gptq")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_four_bits_lose_more_than_eight_and_weigh_less(merged: MergeRecord, tmp_path: Path, method: str) -> None:
    def at(bits: int):
        config = QuantizeConfig(method=method, bits=bits, group_size=16)
        return quantize(merged.out, out=tmp_path / str(bits), config=config, limits=NO_LIMITS)

    four, eight = at(4), at(8)
    assert four.gate.kl_mean > 10 * eight.gate.kl_mean
    assert four.bits_per_weight < eight.bits_per_weight - 3
    assert four.disk_bytes < eight.disk_bytes


def test_two_bits_fail_the_gate_and_the_worst_layers_are_named(merged: MergeRecord, tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", bits=2, group_size=32)
    with pytest.raises(GateError, match=r"worst layers: model\.layers\.\d\.") as caught:
        quantize(merged.out, out=tmp_path / "q2", config=config)
    assert caught.value.exit_code == 4
    assert "--method gptq" in caught.value.message
    record = read_manifest_of(tmp_path / "q2")
    assert record["gate"]["verdict"] == "fail"
    assert len(record["figures"]["layers"]) == 14
    open_decoder(str(tmp_path / "q2"), Source())


def test_manifest_names_the_parent_and_carries_its_data(merged: MergeRecord, tmp_path: Path) -> None:
    quantize(merged.out, out=tmp_path / "q8", config=QuantizeConfig(bits=8, group_size=16), limits=NO_LIMITS)
    record, parent = read_manifest_of(tmp_path / "q8"), read_manifest_of(merged.out)
    assert record["kind"] == "quantized"
    assert record["inputs"]["model"]["path"] == merged.out
    assert record["data"] == parent["data"]
    assert record["golden_tokens"] == parent["golden_tokens"]
    assert record["config"]["bits"] == 8


def test_written_child_runs_and_stays_near_its_parent(merged: MergeRecord, tmp_path: Path) -> None:
    quantize(merged.out, out=tmp_path / "q8", config=QuantizeConfig(bits=8, group_size=16), limits=NO_LIMITS)
    child = logits_of(open_decoder(str(tmp_path / "q8"), Source(dtype="float32")).decoder, TOKENS)
    parent = logits_of(open_decoder(merged.out, Source(dtype="float32")).decoder, TOKENS)
    difference = (child - parent).abs().max()
    assert 0 < difference < 0.2 * parent.std()
    assert child.dtype == torch.float32


def test_calibrating_on_the_gates_rows_is_refused(merged: MergeRecord, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration rows"):
        quantize(merged.out, out=tmp_path / "q", calibration=str(rows_file), data=str(rows_file))


def test_calibration_for_a_method_that_needs_none_is_refused(
    merged: MergeRecord, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="rtn takes no calibration"):
        quantize(merged.out, out=tmp_path / "q", config=QuantizeConfig(method="rtn"), calibration=str(rows_file))


def test_quantizing_an_adapter_says_to_merge_it(tuned: TuneRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="burnish merge"):
        quantize(tuned.adapter, out=tmp_path / "q")


def test_adapter_on_a_quantized_base_learns_and_is_not_merged_into_it(
    merged: MergeRecord, rows_file: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(method="rtn", bits=8, group_size=16)
    quantize(merged.out, out=tmp_path / "q8", config=config, limits=NO_LIMITS)
    record = tune(
        str(tmp_path / "q8"),
        data=DataConfig(source=str(rows_file)),
        out=tmp_path / "adapter",
        lora=LoraConfig(rank=4, alpha=8),
        config=TrainConfig(steps=12, micro_batch_size=4, learning_rate=5e-3, precision="float32"),
        source=Source(dtype="float32"),
    )
    assert record.steps[-1]["loss"] < record.steps[0]["loss"]
    assert logits_of(open_decoder(record.adapter, Source(dtype="float32")).decoder, TOKENS).isfinite().all()
    with pytest.raises(BurnishError, match="cannot be merged into quantized weights"):
        merge(record.adapter, out=tmp_path / "merged")


def test_quantizing_a_quantized_model_is_refused(merged: MergeRecord, tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", bits=8, group_size=16)
    quantize(merged.out, out=tmp_path / "once", config=config, limits=NO_LIMITS)
    with pytest.raises(ConfigError, match="quantized"):
        quantize(str(tmp_path / "once"), out=tmp_path / "twice", config=config, limits=NO_LIMITS)
