"""The task in a gate: answers beside the parent's, verdicts, limits, and the report of a child."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from burnish.compress.config import QuantizeConfig
from burnish.errors import ConfigError, DataError, GateError
from burnish.measure.compare import GateLimits
from burnish.pipeline.evaluate import evaluate
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.gates import QUANTIZE_LIMITS, GateOptions, is_made_from, limits_of_child, quantize_limits
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.quantize import QuantizeRecord, quantize
from burnish.pipeline.runs import load_runs
from burnish.pipeline.side_by_side import write_comparison
from burnish.pipeline.task_gate import compare_on_task
from tiny_llama import write_json

EIGHT = QuantizeConfig(method="rtn", bits=8, group_size=16)


@pytest.fixture(scope="module")
def child(merged: MergeRecord, tmp_path_factory: pytest.TempPathFactory) -> QuantizeRecord:
    out = tmp_path_factory.mktemp("gates") / "q8"
    return quantize(merged.out, out=out, config=EIGHT, limits=GateLimits(), gate_options=GateOptions(rows=4))


def test_child_and_parent_answer_the_same_held_out_questions(child: QuantizeRecord) -> None:
    task = child.gate.task
    assert task is not None
    assert task.num_rows == 4
    assert task.metric == "exact match"
    assert 0 <= task.parent_low <= task.parent_score <= task.parent_high <= 1
    assert task.lost + task.gained == len(task.changed)


def test_no_rows_leave_the_task_out(merged: MergeRecord, tmp_path: Path) -> None:
    record = quantize(
        merged.out, out=tmp_path / "q8", config=EIGHT, limits=QUANTIZE_LIMITS[2], gate_options=GateOptions(rows=0)
    )
    assert record.gate.task is None
    assert record.gate.limits == QUANTIZE_LIMITS[2]


def test_rows_without_sql_are_not_asked(merged: MergeRecord, tmp_path: Path) -> None:
    rows = write_json(tmp_path / "rows.json", [{"instruction": "Say hello.", "output": "hello"}] * 3)
    opened = open_decoder(merged.out, Source())
    found = compare_on_task(opened.decoder, opened.decoder, opened.tokenizer, data=str(rows), recorded=None, num_rows=3)
    assert found is None


def test_a_model_beside_itself_loses_nothing(merged: MergeRecord, held_out_file: Path) -> None:
    first, second = (open_decoder(merged.out, Source()) for _ in range(2))
    task = compare_on_task(
        first.decoder, second.decoder, first.tokenizer, data=str(held_out_file), recorded=None, num_rows=5
    )
    assert task is not None
    assert (task.num_rows, task.lost, task.gained, task.reworded) == (5, 0, 0, 0)


def test_evaluating_a_child_beside_its_parent_judges_it(
    child: QuantizeRecord, merged: MergeRecord, held_out_file: Path, tmp_path: Path
) -> None:
    rows = DataConfig(source=str(held_out_file))
    record = evaluate(child.out, data=rows, against=merged.out, gate_options=GateOptions(max_kl=1e-9), max_tokens=24)
    assert record.gate is not None
    assert record.gate.verdict == "fail"
    assert "mean KL" in record.gate.reasons[0]
    assert "worst layers: model.layers." in record.gate.reasons[-1]
    assert record.gate.task is not None
    page = tmp_path / "beside.html"
    write_comparison(page, record, Source())
    text = page.read_text()
    assert "child failed its gate" in text
    assert Path(child.out).name in text
    write_comparison(tmp_path / "beside.md", record, Source())
    assert "| parent |" in (tmp_path / "beside.md").read_text()


def test_a_model_without_limits_is_compared_and_not_judged(
    tiny: Path, merged: MergeRecord, held_out_file: Path, tmp_path: Path
) -> None:
    rows = DataConfig(source=str(held_out_file))
    record = evaluate(str(tiny), data=rows, against=merged.out, max_tokens=8)
    assert record.gate is None
    assert record.kl_mean is not None
    write_comparison(tmp_path / "x.md", record, Source())
    assert "No gate was run" in (tmp_path / "x.md").read_text()
    with pytest.raises(DataError, match="nothing to report"):
        write_comparison(tmp_path / "y.md", replace(record, against=None), Source())


def test_a_childs_folder_is_a_report(child: QuantizeRecord, tiny: Path) -> None:
    run = load_runs([child.out])[0]
    assert [variant.name for variant in run.variants] == ["parent", "child"]
    assert run.variants[1].kl_to_parent == child.gate.kl_mean
    assert run.variants[1].disk_bytes
    assert run.stages[0].name == "quantized"
    with pytest.raises(DataError, match="no run"):
        load_runs([str(tiny)])


def test_a_failing_child_says_what_to_try(merged: MergeRecord, tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", bits=4, group_size=32)
    with pytest.raises(GateError) as caught:
        quantize(merged.out, out=tmp_path / "q", config=config, gate_options=GateOptions(rows=0, max_kl_p99=0.0))
    assert "p99 KL" in caught.value.message
    assert "--target-bits 5" in caught.value.message
    assert "(layers." in caught.value.message


def test_limits_come_from_the_manifest_the_bits_or_nowhere() -> None:
    made = {"gate": {"limits": {"max_kl_mean": 0.3}}}
    assert limits_of_child(made, {}) == GateLimits(max_kl_mean=0.3)
    assert limits_of_child(None, {"quantization_config": {"bits": 4}}) == QUANTIZE_LIMITS[4]
    assert limits_of_child(None, {}) is None
    assert quantize_limits(5.2) == QUANTIZE_LIMITS[4]
    assert quantize_limits(1.5) == QUANTIZE_LIMITS[2]


def test_the_limit_of_the_percentile_moves_with_that_of_the_mean() -> None:
    limits = GateOptions(max_kl=0.2).applied(QUANTIZE_LIMITS[4])
    assert (limits.max_kl_mean, limits.max_kl_p99) == (0.2, pytest.approx(4.0))
    assert GateOptions(max_kl=0.2, max_kl_p99=1.0).applied(QUANTIZE_LIMITS[4]).max_kl_p99 == 1.0
    assert GateOptions(max_kl=0.2).applied(GateLimits()).max_kl_p99 is None


def test_a_merged_model_is_judged_beside_its_adapter_and_not_beside_its_base() -> None:
    manifest = {"kind": "merged", "inputs": {"base": {"fingerprint": "b"}, "adapter": {"fingerprint": "a"}}}
    assert is_made_from(manifest, "a")
    assert not is_made_from(manifest, "b")
    assert is_made_from({"kind": "quantized", "inputs": {"model": {"fingerprint": "b"}}}, "b")
    assert not is_made_from(None, "b")


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="gate-rows"):
        GateOptions(rows=-1)
    with pytest.raises(ConfigError, match="needs answers"):
        GateOptions(rows=0, max_score_drop=0.1)
    with pytest.raises(ConfigError, match="min_greedy_agreement"):
        GateOptions(min_agreement=1.5)
