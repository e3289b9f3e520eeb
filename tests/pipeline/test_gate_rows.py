"""What a gate is held on: rows the child has not seen, all that bring SQL, and a verdict that is this child's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish.compress.config import QuantizeConfig
from burnish.compress.prune_config import PruneConfig
from burnish.engine.native import NativeEngine
from burnish.errors import ConfigError, DataError
from burnish.measure.compare import GateLimits
from burnish.models.decoder import Decoder
from burnish.pipeline import quantize as stage
from burnish.pipeline import task_gate
from burnish.pipeline.calibration_rows import refuse_gate_rows
from burnish.pipeline.evaluate import evaluate
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.export import export
from burnish.pipeline.gates import QUANTIZE_LIMITS, GateOptions, limits_of_child
from burnish.pipeline.merge import MergeRecord, merge
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.prune import prune
from burnish.pipeline.quantize import quantize
from burnish.pipeline.tune import TuneRecord
from burnish.pipeline.unfinished_quantization import PARTIAL
from tiny_llama import sql_rows, write_json

EIGHT = QuantizeConfig(bits=8, group_size=16)
ROUNDED = QuantizeConfig(method="rtn", bits=8, group_size=16)
PLAIN = [{"instruction": "Say hello.", "output": "hello"}] * 3


def test_rows_of_the_calibration_are_refused_however_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_json(tmp_path / "rows.json", PLAIN)
    monkeypatch.chdir(tmp_path)
    for calibration, data, recorded in (
        (str(rows), "rows.json", None),
        ("rows.json", None, {"eval_source": str(rows)}),
        ("text-to-sql:validation", None, None),
        ("text-to-sql:train", "text-to-sql:train:50", None),
        ("org/name", "org/name", None),
    ):
        with pytest.raises(DataError, match="the gate's rows are the calibration rows"):
            refuse_gate_rows(calibration, data=data, recorded=recorded)
    for calibration, data in ((None, str(rows)), ("text-to-sql:train", None), ("rows.json", "other.json")):
        refuse_gate_rows(calibration, data=data, recorded=None)


def test_calibrating_on_the_rows_of_the_models_evaluation_is_refused(
    merged: MergeRecord, held_out_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="calibration rows"):
        quantize(merged.out, out=tmp_path / "q", calibration=str(held_out_file))
    with pytest.raises(DataError, match="calibration rows"):
        prune(merged.out, out=tmp_path / "p", calibration=str(held_out_file))


def test_rows_that_bring_sql_are_asked_among_others(merged: MergeRecord, tmp_path: Path) -> None:
    mixed = [dict(row) for row in sql_rows(30)[24:]]
    mixed.insert(1, {**mixed[0], "context": "Only words."})
    rows = write_json(tmp_path / "rows.json", mixed)
    models = [open_decoder(merged.out, Source()) for _ in range(2)]
    task = task_gate.compare_on_task(
        models[0].decoder, models[1].decoder, models[0].tokenizer, data=str(rows), recorded=None, num_rows=4
    )
    assert task is not None
    assert task.num_rows == 3


def test_long_questions_get_room_and_run_fewer_at_a_time(
    merged: MergeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    class Seen(NativeEngine):
        def __init__(self, model: Decoder, *, max_model_len: int, max_num_seqs: int, **options: Any) -> None:
            made.append((max_model_len, max_num_seqs))
            super().__init__(model, max_model_len=max_model_len, max_num_seqs=max_num_seqs, **options)

    monkeypatch.setattr(task_gate, "NativeEngine", Seen)
    monkeypatch.setattr(task_gate, "USUAL_PROMPT", 4)
    monkeypatch.setattr(task_gate, "MAX_ANSWER", 2)
    rows = write_json(tmp_path / "rows.json", sql_rows(30)[24:])
    models = [open_decoder(merged.out, Source()) for _ in range(2)]
    task = task_gate.compare_on_task(
        models[0].decoder, models[1].decoder, models[0].tokenizer, data=str(rows), recorded=None, num_rows=2
    )
    assert task is not None
    assert len(made) == 2
    for length, together in made:
        assert length > 20  # the schema alone is longer
        assert 1 <= together < task_gate.MAX_NUM_SEQS
        assert together == 1 or together * length <= task_gate.MAX_NUM_SEQS * 6


def test_a_limit_on_the_score_without_sql_is_refused_before_the_work(
    merged: MergeRecord, tuned: TuneRecord, tmp_path: Path
) -> None:
    rows = str(write_json(tmp_path / "rows.json", PLAIN))
    options = GateOptions(max_score_drop=0.1)
    with pytest.raises(ConfigError, match="no held-out row brings SQL"):
        quantize(merged.out, out=tmp_path / "q", config=ROUNDED, data=rows, gate_options=options)
    with pytest.raises(ConfigError, match="no held-out row brings SQL"):
        prune(merged.out, out=tmp_path / "p", config=PruneConfig(method="magnitude"), data=rows, gate_options=options)
    with pytest.raises(ConfigError, match="no held-out row brings SQL"):
        merge(tuned.adapter, out=tmp_path / "m", data=rows, gate_options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_limits_that_nothing_is_held_against_are_refused(merged: MergeRecord, held_out_file: Path) -> None:
    rows = DataConfig(source=str(held_out_file))
    with pytest.raises(ConfigError, match="limits need a parent"):
        evaluate(merged.out, data=rows, gate_options=GateOptions(max_kl=1.0))
    for task in ("bleu", "perplexity"):
        with pytest.raises(ConfigError, match=f"nothing to judge with task {task}"):
            evaluate(merged.out, task=task, data=rows, against=merged.out, gate_options=GateOptions(max_score_drop=0.1))


def test_folders_of_other_programs_are_judged_by_their_bits() -> None:
    groups = {
        "group_0": {"weights": {"num_bits": 4}, "targets": ["re:.*down_proj"]},
        "group_1": {"weights": {"num_bits": 8}, "targets": ["Linear"]},
    }
    for record, limits in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, QUANTIZE_LIMITS[4]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, QUANTIZE_LIMITS[8]),
        ({"quant_method": "compressed-tensors", "config_groups": groups}, QUANTIZE_LIMITS[4]),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
        ("gptq", None),
    ):
        assert limits_of_child(None, {"quantization_config": record}) == limits
    with pytest.raises(ConfigError, match="limits in the model's manifest"):
        limits_of_child({"gate": {"limits": {"max_kl_median": 1.0}}}, {})


def test_a_child_in_the_place_of_another_does_not_inherit_its_verdict(
    merged: MergeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    few = GateOptions(rows=0)
    quantize(merged.out, out=out, config=EIGHT, num_samples=4, limits=GateLimits(), gate_options=few)
    assert json.loads((out / "burnish.json").read_text())["gate"]["verdict"] == "pass"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "compare_on_task", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(merged.out, out=out, config=EIGHT, num_samples=4, gate_options=few, overwrite=True)
    assert not (out / "burnish.json").exists()
    assert (out / PARTIAL).exists()
    said: list[str] = []
    again = quantize(
        merged.out, out=out, config=EIGHT, num_samples=4, limits=GateLimits(), gate_options=few, notify=said.append
    )
    assert said[0].startswith("going on after 2 of 2 blocks")
    assert again.gate.passed
    assert not (out / PARTIAL).exists()


def test_a_child_never_takes_its_parents_place(merged: MergeRecord, tuned: TuneRecord, tmp_path: Path) -> None:
    parent, base = tmp_path / "parent", tmp_path / "base"
    shutil.copytree(merged.out, parent)
    shutil.copytree(tuned.base, base)
    before = (parent / "model.safetensors").read_bytes()
    for make in (
        lambda: quantize(str(parent), out=parent, config=ROUNDED, overwrite=True),
        lambda: prune(str(parent), out=parent, config=PruneConfig(method="magnitude"), overwrite=True),
        lambda: export(str(parent), to="safetensors", out=parent, overwrite=True),
        lambda: merge(tuned.adapter, base=str(base), out=base, overwrite=True),
        lambda: merge(tuned.adapter, out=tuned.adapter, overwrite=True),
    ):
        with pytest.raises(ConfigError, match="is what it is made from"):
            make()
    assert (parent / "model.safetensors").read_bytes() == before
    assert (parent / "burnish.json").exists()
