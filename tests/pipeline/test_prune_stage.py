from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fakes import logits_of, read_manifest_of

import burnish
from burnish.compress.config import QuantizeConfig
from burnish.compress.prune_config import PruneConfig
from burnish.errors import ConfigError, DataError, GateError
from burnish.measure.compare import GateLimits
from burnish.models.loading import load_config
from burnish.pipeline.gates import PRUNE_LIMITS
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.prune import SMALLER, ZEROS_COST, prune
from burnish.pipeline.quantize import quantize
from burnish.pipeline.recovery import RecoverConfig
from burnish.pipeline.tune import TuneRecord

NO_LIMITS = GateLimits()
TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]
RECOVER = RecoverConfig(steps=12, rank=4, learning_rate=5e-3, batch_size=4)


def _prune(model: str, out: Path, *, recover: RecoverConfig | None = None, **settings: Any):
    return prune(model, out=out, config=PruneConfig(**settings), recover=recover, limits=NO_LIMITS)


def _zeros(folder: Path) -> dict[str, torch.Tensor]:
    decoder = open_decoder(str(folder), Source(dtype="float32")).decoder
    return {name: value == 0 for name, value in decoder.named_parameters() if "_proj" in name}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_record_says_what_was_done_and_what_zeros_are_worth(
    merged: MergeRecord, rows_file: Path, tmp_path: Path, method: str
) -> None:
    record = _prune(merged.out, tmp_path / "p", method=method, sparsity=0.1)
    assert record.sparsity == pytest.approx(0.1, abs=1e-3)
    assert record.speed == ZEROS_COST
    assert len(record.layers) == 14
    assert (record.parameters, record.dense_columns) == (record.parent_parameters, 0)
    assert record.disk_bytes > 0.9 * merged.disk_bytes
    assert record.seconds > 0
    assert record.recovery is None
    calibrated = method != "magnitude"
    assert (record.calibration_tokens > 0) == calibrated
    assert record.calibration_source == (str(rows_file) if calibrated else None)
    assert 0 < record.gate.kl_mean < 1
    assert float(
        torch.cat([mask.flatten() for mask in _zeros(tmp_path / "p").values()]).float().mean()
    ) == pytest.approx(record.sparsity)


def test_half_the_weights_fail_the_gate_and_the_worst_layers_are_named(merged: MergeRecord, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"worst layers: model\.layers\.\d\.") as caught:
        prune(merged.out, out=tmp_path / "p", config=PruneConfig(method="magnitude", sparsity=0.7))
    assert caught.value.exit_code == 4
    for advice in ("--method sparsegpt", "a smaller --sparsity", "--recover"):
        assert advice in caught.value.message
    record = read_manifest_of(tmp_path / "p")
    assert record["gate"]["verdict"] == "fail"
    assert len(record["figures"]["layers"]) == 14
    open_decoder(str(tmp_path / "p"), Source())


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": (2, 4)}, {"method": "wanda", "sparsity": 0.5}])
def test_recovery_keeps_every_zero_and_wins_back_some_of_the_loss(
    merged: MergeRecord, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = _prune(merged.out, tmp_path / "plain", **settings)
    better = _prune(merged.out, tmp_path / "better", recover=RECOVER, **settings)
    assert better.recovery is not None
    assert better.recovery.steps == 12
    assert better.recovery.num_rows == 24
    assert better.recovery.loss_after < better.recovery.loss_before
    assert better.gate.perplexity_child < plain.gate.perplexity_child
    zeros, kept = _zeros(tmp_path / "plain"), _zeros(tmp_path / "better")
    assert all(torch.equal(kept[name] & zeros[name], zeros[name]) for name in zeros)
    assert better.sparsity == pytest.approx(plain.sparsity, abs=1e-4)
    assert read_manifest_of(tmp_path / "better")["config"]["recover"]["steps"] == 12


def test_structured_child_is_smaller_and_recovers(merged: MergeRecord, tmp_path: Path) -> None:
    settings = {"method": "structured", "heads": 0.5, "channels": 0.25, "layers": 1}
    plain = _prune(merged.out, tmp_path / "plain", **settings)
    better = _prune(merged.out, tmp_path / "better", recover=RECOVER, **settings)
    assert better.speed == SMALLER
    assert better.parameters < better.parent_parameters
    assert better.disk_bytes < merged.disk_bytes
    assert 0.5 < better.sparsity < 0.9
    assert better.gate.perplexity_child < plain.gate.perplexity_child
    shape = load_config(tmp_path / "better")
    assert (shape.num_layers, shape.num_kv_heads, shape.intermediate_size) == (1, 1, 48)


def test_structured_child_with_nothing_removed_is_its_parent(merged: MergeRecord, tmp_path: Path) -> None:
    record = _prune(merged.out, tmp_path / "same", method="structured")
    child = logits_of(open_decoder(record.out, Source(dtype="float32")).decoder, TOKENS)
    assert torch.equal(child, logits_of(open_decoder(merged.out, Source(dtype="float32")).decoder, TOKENS))
    assert record.gate.kl_mean == 0.0


def test_default_limits_are_those_of_the_method_or_of_a_recovered_child(merged: MergeRecord, tmp_path: Path) -> None:
    for recover, key in ((None, "sparsegpt"), (RECOVER, "recovered")):
        with pytest.raises(GateError):
            prune(merged.out, out=tmp_path / key, config=PruneConfig(sparsity=0.95), recover=recover)
        limits = read_manifest_of(tmp_path / key)["gate"]["limits"]
        assert limits["max_kl_mean"] == PRUNE_LIMITS[key].max_kl_mean
        assert limits["max_perplexity_ratio"] == PRUNE_LIMITS[key].max_perplexity_ratio


def test_manifest_names_the_parent_and_carries_its_data(merged: MergeRecord, tmp_path: Path) -> None:
    _prune(merged.out, tmp_path / "p", sparsity=0.2)
    record, parent = read_manifest_of(tmp_path / "p"), read_manifest_of(merged.out)
    assert record["kind"] == "pruned"
    assert record["inputs"]["model"]["path"] == merged.out
    assert record["data"] == parent["data"]
    assert record["config"]["sparsity"] == 0.2


def test_a_pruned_child_is_quantized_like_any_dense_model(merged: MergeRecord, tmp_path: Path) -> None:
    _prune(merged.out, tmp_path / "p", pattern=(2, 4))
    config = QuantizeConfig(bits=8, group_size=16)
    record = quantize(str(tmp_path / "p"), out=tmp_path / "q", config=config, limits=NO_LIMITS)
    assert record.gate.kl_mean < 1e-2


def test_calibrating_on_the_gates_rows_is_refused(merged: MergeRecord, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration rows"):
        prune(merged.out, out=tmp_path / "p", calibration=str(rows_file), data=str(rows_file))


def test_magnitude_takes_rows_only_to_recover(merged: MergeRecord, rows_file: Path, tmp_path: Path) -> None:
    config = PruneConfig(method="magnitude", sparsity=0.3)
    with pytest.raises(ConfigError, match="magnitude takes no calibration data"):
        prune(merged.out, out=tmp_path / "p", config=config, calibration=str(rows_file))
    record = prune(
        merged.out, out=tmp_path / "p", config=config, calibration=str(rows_file), recover=RECOVER, limits=NO_LIMITS
    )
    assert record.calibration_tokens == 0
    assert record.calibration_source == str(rows_file)


def test_adapters_and_quantized_models_are_refused(tuned: TuneRecord, merged: MergeRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="burnish merge"):
        prune(tuned.adapter, out=tmp_path / "p")
    quantize(
        merged.out, out=tmp_path / "q", config=QuantizeConfig(method="rtn", bits=8, group_size=16), limits=NO_LIMITS
    )
    with pytest.raises(ConfigError, match=r"is quantized. Prune its dense parent"):
        prune(str(tmp_path / "q"), out=tmp_path / "p")


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"steps": 1, "rank": 0}, {"steps": 1, "batch_size": 0}, {"steps": 1, "learning_rate": 0.0}],
)
def test_recovery_refuses_what_cannot_be_done(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        RecoverConfig(**options)


def test_names_of_the_package() -> None:
    assert burnish.prune is prune
    assert burnish.PruneConfig is PruneConfig
    assert burnish.RecoverConfig is RecoverConfig
