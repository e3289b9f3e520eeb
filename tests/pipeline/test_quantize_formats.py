"""Every layout through the stage: written, gated, read back as what it is to be, planned and run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_fakes import read_manifest_of

from burnish.compress.config import QuantizeConfig
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.engine.cpu_program import against
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError, GateError
from burnish.measure.compare import GateLimits
from burnish.pipeline.bench import quantization_of
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.quantize import quantize
from burnish.plan.source import find_model

NO_LIMITS = GateLimits()
SMOOTH = QuantizeConfig(method="smoothquant", bits=8, group_size=-1)
CASES = {
    "smoothquant": (SMOOTH, "compressed-tensors-w8a8", "w8a8", Int8Linear),
    "w8a8": (QuantizeConfig(method="w8a8", bits=8, group_size=-1), "compressed-tensors-w8a8", "w8a8", Int8Linear),
    "w4a16": (
        QuantizeConfig(method="rtn", bits=4, group_size=16, format="compressed-tensors"),
        "compressed-tensors-w4a16",
        "int4",
        GroupQuantizedLinear,
    ),
    "nf4": (QuantizeConfig(method="nf4", bits=4, group_size=64), "bitsandbytes-4bit", None, None),
    "int8": (QuantizeConfig(method="llm.int8", bits=8, group_size=-1), "bitsandbytes-8bit", None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_children_of_every_layout(merged: MergeRecord, tmp_path: Path, name: str) -> None:
    config, label, weight_format, layer = CASES[name]
    record = quantize(merged.out, out=tmp_path / "q", config=config, limits=NO_LIMITS)
    assert record.format == config.layout
    assert record.gate.kl_mean < (0.02 if config.bits == 8 else 0.5)
    assert (record.calibration_tokens > 0) == config.needs_calibration
    assert len(record.layers) == 14
    assert record.predicted_peak_bytes
    manifest = read_manifest_of(tmp_path / "q")
    assert (manifest["config"]["method"], manifest["figures"]["format"]) == (config.method, config.layout)
    source = find_model(tmp_path / "q")
    assert (source.weight_format, quantization_of(str(tmp_path / "q"), Source())) == (weight_format, label)
    opened = open_decoder(str(tmp_path / "q"), Source())
    packed = [module for module in opened.decoder.modules() if isinstance(module, (Int8Linear, GroupQuantizedLinear))]
    assert {type(module) for module in packed} == ({layer} if layer else set())
    assert against(opened.decoder) is None  # the compiled kernels take it as it is
    engine = NativeEngine(opened.decoder, tokenizer=opened.tokenizer)
    assert len(next(iter(engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3)))).token_ids) > 0


def test_a_cache_of_eight_bits_is_judged_with_the_child(merged: MergeRecord, tmp_path: Path) -> None:
    plain, cached = (
        quantize(merged.out, out=tmp_path / kind, config=SMOOTH, limits=NO_LIMITS, kv_dtype=kind)
        for kind in ("auto", "int8")
    )
    assert cached.gate.kl_mean != plain.gate.kl_mean
    assert cached.gate.kl_mean < 0.02
    assert read_manifest_of(tmp_path / "int8")["figures"]["kv_dtype"] == "int8"


def test_embeddings_weigh_less_in_eight_bits(merged: MergeRecord, tmp_path: Path) -> None:
    whole = quantize(merged.out, out=tmp_path / "whole", config=SMOOTH, limits=NO_LIMITS)
    config = QuantizeConfig(method="smoothquant", bits=8, group_size=-1, embeddings=True)
    small = quantize(merged.out, out=tmp_path / "small", config=config, limits=NO_LIMITS)
    assert small.disk_bytes < whole.disk_bytes
    assert small.gate.kl_mean < 0.02


def test_a_worse_child_fails_and_says_what_to_try(merged: MergeRecord, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"(?s)worst layers.*--method gptq"):
        quantize(
            merged.out,
            out=tmp_path / "q",
            config=QuantizeConfig(method="nf4", bits=4, group_size=64),
            limits=GateLimits(max_kl_mean=1e-9),
        )
    assert read_manifest_of(tmp_path / "q")["gate"]["verdict"] == "fail"


def test_methods_without_calibration_take_none(merged: MergeRecord, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="w8a8 takes no calibration data"):
        quantize(
            merged.out,
            out=tmp_path / "q",
            config=QuantizeConfig(method="w8a8", bits=8, group_size=-1),
            calibration=str(rows_file),
        )
    with pytest.raises(ConfigError, match="kv_dtype is not known"):
        quantize(merged.out, out=tmp_path / "q", config=SMOOTH, kv_dtype="int4")
