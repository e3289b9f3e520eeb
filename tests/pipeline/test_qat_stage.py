"""`quantize` with quantization-aware training after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fakes import logits_of, read_manifest_of

import burnish
from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.errors import ConfigError, DataError
from burnish.measure.compare import GateLimits
from burnish.pipeline.gates import GateOptions
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.qat import CHECKPOINTS, QatConfig
from burnish.pipeline.quantize import QuantizeRecord, quantize
from burnish.pipeline.unfinished_quantization import PARTIAL
from tiny_llama import sql_rows, write_json

TWO_BITS = QuantizeConfig(bits=2, group_size=16, symmetric=False)
QAT = QatConfig(steps=20, rank=4, learning_rate=1e-2, batch_size=4)
TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]


def _quantize(model: str, out: Path, **settings: Any) -> QuantizeRecord:
    given = {"config": TWO_BITS, "qat": QAT, "num_samples": 8, "limits": GateLimits(), **settings}
    return quantize(model, out=out, gate_options=GateOptions(rows=0), **given)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_trained_child_is_nearer_to_its_parent(
    merged: MergeRecord, rows_file: Path, tmp_path: Path, method: str
) -> None:
    config = QuantizeConfig(method=method, bits=2, group_size=16, symmetric=False)
    plain = _quantize(merged.out, tmp_path / "plain", config=config, qat=None)
    record = _quantize(merged.out, tmp_path / "trained", config=config)
    assert record.gate.kl_mean < 0.9 * plain.gate.kl_mean
    assert record.disk_bytes == pytest.approx(plain.disk_bytes, rel=0.5)
    assert record.bits_per_weight == plain.bits_per_weight
    assert plain.qat is None
    assert record.qat is not None
    assert record.qat.steps == len(record.qat.loss) == 20
    assert (record.qat.num_rows, record.qat.num_held_back) == (18, 6)
    assert record.qat.loss_after < record.qat.loss_before
    curve = {point.step: point.loss for point in record.qat.held_back_loss}
    assert list(curve) == [0, 4, 8, 12, 16, 20]
    assert (curve[0], curve[record.qat.kept_step]) == (record.qat.loss_before, record.qat.loss_after)
    assert 0 < record.qat.changed < 1
    assert record.calibration_source == str(rows_file)
    assert (record.calibration_tokens > 0) == (method == "gptq")
    manifest = read_manifest_of(tmp_path / "trained")
    assert manifest["config"]["qat"]["steps"] == 20
    assert manifest["figures"]["qat"]["loss"][-1]["step"] == 20
    names = {path.name for path in (tmp_path / "trained").iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}


@pytest.mark.parametrize("settings", [{"rotate": True}, {"activation_order": True, "bits": 3}, {"group_size": -1}])
def test_whatever_the_start_training_begins_with_it(
    merged: MergeRecord, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = QuantizeConfig(**{"bits": 2, "group_size": 16, "symmetric": False, **settings})
    still = QatConfig(steps=1, rank=4, learning_rate=1e-30, batch_size=4)
    plain = _quantize(merged.out, tmp_path / "plain", config=config, qat=None)
    record = _quantize(merged.out, tmp_path / "trained", config=config, qat=still)
    assert record.qat is not None
    assert record.qat.changed == 0
    assert record.gate == plain.gate
    better = _quantize(merged.out, tmp_path / "better", config=config)
    assert better.gate.kl_mean < plain.gate.kl_mean


def test_training_that_does_harm_leaves_what_the_quantization_gave(merged: MergeRecord, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=8, group_size=16)
    plain = _quantize(merged.out, tmp_path / "plain", config=config, qat=None)
    wild = QatConfig(steps=5, rank=4, learning_rate=3.0, batch_size=4)
    record = _quantize(merged.out, tmp_path / "trained", config=config, qat=wild)
    assert record.qat is not None
    assert (record.qat.kept_step, record.qat.changed) == (0, 0)
    assert record.qat.loss_after == record.qat.loss_before
    assert record.gate == plain.gate


def test_too_few_rows_to_hold_some_back_are_refused(merged: MergeRecord, tmp_path: Path) -> None:
    rows = write_json(tmp_path / "rows.json", sql_rows(3))
    with pytest.raises(DataError, match="too few rows"):
        _quantize(merged.out, tmp_path / "q", calibration=str(rows))


def test_widths_that_were_chosen_one_by_one_stay(merged: MergeRecord, tmp_path: Path) -> None:
    mixed = MixedPrecision(target_bits=5.5, tokens=64)
    plain = _quantize(merged.out, tmp_path / "plain", mixed=mixed, qat=None)
    record = _quantize(merged.out, tmp_path / "trained", mixed=mixed)
    assert len(set(record.widths.values())) > 1
    assert record.widths == plain.widths
    assert record.bits_per_weight == plain.bits_per_weight


def test_labels_instead_of_the_parent(merged: MergeRecord, tmp_path: Path) -> None:
    labels = QatConfig(steps=20, rank=4, batch_size=4, distill=False)
    plain = _quantize(merged.out, tmp_path / "plain", qat=None)
    record = _quantize(merged.out, tmp_path / "trained", qat=labels)
    assert record.qat is not None
    assert record.qat.loss_after < record.qat.loss_before
    assert record.gate.perplexity_child < plain.gate.perplexity_child


def test_interrupted_training_goes_on_and_ends_as_if_it_had_not_been(merged: MergeRecord, tmp_path: Path) -> None:
    def interrupt(label: str, done: int, total: int, note: str = "") -> None:
        if label.startswith("Training") and done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _quantize(merged.out, out, progress=interrupt)
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    assert (out / PARTIAL / CHECKPOINTS / "checkpoint-000007").is_dir()

    with pytest.raises(ConfigError, match=r"another training\.steps: 20 there, 30 here.*--resume never"):
        _quantize(merged.out, out, qat=QatConfig(steps=30, rank=4, learning_rate=1e-2, batch_size=4))

    said: list[str] = []
    record = _quantize(merged.out, out, notify=said.append)
    whole = _quantize(merged.out, tmp_path / "whole")
    assert any("going on after step 7" in line for line in said)
    assert record.qat is not None
    assert whole.qat is not None
    assert (record.qat.resumed_from, whole.qat.resumed_from) == (7, None)
    assert [point.loss for point in record.qat.loss] == [point.loss for point in whole.qat.loss]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (out / PARTIAL).exists()


def test_parent_is_what_the_child_is_compared_with_and_not_what_was_trained(
    merged: MergeRecord, tmp_path: Path
) -> None:
    before = logits_of(open_decoder(merged.out, Source(dtype="float32")).decoder, TOKENS)
    record = _quantize(merged.out, tmp_path / "trained")
    assert record.gate.perplexity_parent == _quantize(merged.out, tmp_path / "plain", qat=None).gate.perplexity_parent
    child = logits_of(open_decoder(record.out, Source(dtype="float32")).decoder, TOKENS)
    assert not torch.equal(child, before)


@pytest.mark.parametrize("method", ["awq", "awq-gptq", "smoothquant", "nf4"])
def test_methods_that_move_the_parents_weights_are_refused(merged: MergeRecord, tmp_path: Path, method: str) -> None:
    fixed: dict[str, Any] = {"smoothquant": {"bits": 8, "group_size": -1}, "nf4": {"group_size": 64}}.get(method, {})
    with pytest.raises(ConfigError, match=f"{method} cannot be trained further"):
        _quantize(merged.out, tmp_path / "q", config=QuantizeConfig(method=method, **fixed))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 1, "rank": 0}, {"steps": 1, "batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        QatConfig(**options)
    for rate in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="learning_rate is out of range"):
            QatConfig(steps=1, learning_rate=rate)


def test_name_of_the_package() -> None:
    assert burnish.QatConfig is QatConfig
