"""`tune --memory` and `--dry-run`: budgets are kept, losses do not hang on them, and nothing else changes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from burnish.cli.main import app
from burnish.errors import CapacityError, ConfigError
from burnish.measure.memory import resident_bytes
from burnish.pipeline import tune as tune_module
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source
from burnish.pipeline.resuming import ResumeConfig
from burnish.pipeline.tune import TuneRecord, tune
from burnish.pipeline.tune_rehearsal import rehearse
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import sql_rows, write_json, write_tiny_llama

PROGRAM = Path(__file__).with_name("tune_within.py")
LORA = LoraConfig(rank=4, alpha=8)
ROOMY = 64 << 30


def drawn(seed: int) -> dict[str, Any]:
    source = random.Random(seed)
    return {
        "hidden": source.choice((32, 64, 96)),
        "rows": source.choice((16, 40)),
        "length": source.choice((60, 200)),
        "method": ("lora", "full", "qlora-4bit", "qlora-8bit")[seed % 4],
        "precision": source.choice(("auto", "float32")),
        "share": source.uniform(0, 0.7),
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's high-water mark is Linux's")
@pytest.mark.parametrize("seed", range(6))
def test_the_process_stays_within_its_budget(tmp_path: Path, seed: int) -> None:
    asked = drawn(seed)
    model = write_tiny_llama(tmp_path / "model", hidden=asked["hidden"])
    data = write_json(tmp_path / "rows.json", sql_rows(asked["rows"]))
    command = [sys.executable, str(PROGRAM), str(model), str(data), str(tmp_path / "out"), json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BURNISH_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    found = json.loads(done.stdout)
    assert found["peak"] <= found["budget"]
    fit = found["fit"]
    assert fit["start_bytes"] + fit["measured_peak_bytes"] <= found["budget"]
    assert fit["start_bytes"] + fit["predicted_peak_bytes"] + fit["correction_bytes"] <= found["budget"]


def run(model: Path, data: Path, out: Path, *, resume: str = "auto", **settings: Any) -> TuneRecord:
    memory = settings.pop("memory", None)
    base = {"steps": 4, "micro_batch_size": 2, "gradient_accumulation": 4, "precision": "float32"}
    return tune(
        str(model),
        data=DataConfig(source=str(data)),
        out=out,
        lora=LORA,
        config=TrainConfig(**{**base, **settings}),
        source=Source(dtype="float32"),
        resume=ResumeConfig(resume=resume),
        memory=memory,
    )


def test_losses_are_those_without_a_budget_and_the_choice_is_on_record(
    tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    free = run(tiny, rows_file, tmp_path / "free")
    told: list[str] = []
    chosen = tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        out=tmp_path / "chosen",
        lora=LORA,
        config=TrainConfig(steps=4, micro_batch_size=2, gradient_accumulation=4, precision="float32"),
        source=Source(dtype="auto"),
        memory=ROOMY,
        notify=told.append,
    )
    assert [step["loss"] for step in chosen.steps] == pytest.approx([step["loss"] for step in free.steps], abs=1e-5)
    assert free.fit is None
    assert chosen.fit is not None
    assert chosen.fit["budget_bytes"] == ROOMY
    assert chosen.fit["setting"] == "512 tokens at once, no checkpointing, float32"
    assert chosen.fit["measured_peak_bytes"] > 0
    assert any("512 tokens at once" in line and "64.0 GiB" in line for line in told)


def test_a_budget_below_what_is_there_is_refused_before_the_model_is_loaded(
    tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(tune_module, "open_decoder", fail)
    with pytest.raises(CapacityError, match=r"nothing fits into .* the smallest budget") as caught:
        run(tiny, rows_file, tmp_path / "out", memory=resident_bytes() // 2)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="memory is not a size"):
        run(tiny, rows_file, tmp_path / "out", memory="much")


def test_a_run_that_goes_on_keeps_what_it_chose(
    tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, rows_file, tmp_path / "whole", memory=ROOMY, checkpoint_every=1, gradient_checkpointing=True)
    out = tmp_path / "out"
    saving = {"save_every": 2, "gradient_checkpointing": True}
    monkeypatch.setattr(tune_module, "_save", _killed)
    with pytest.raises(_Killed):
        run(tiny, rows_file, out, memory=ROOMY, **saving)
    monkeypatch.undo()
    resumed = run(tiny, rows_file, out, memory=ROOMY, **saving)
    assert resumed.resumed_from == 4
    assert [step["loss"] for step in resumed.steps] == [step["loss"] for step in whole.steps]


class _Killed(Exception):
    pass


def _killed(*args: object) -> None:
    raise _Killed


def test_a_rehearsal_predicts_tries_and_writes_nothing(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    record = rehearse(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        lora=LORA,
        config=TrainConfig(epochs=2, micro_batch_size=8, precision="float32"),
        source=Source(dtype="float32"),
    )
    assert record.fit is None
    assert record.steps == 6
    assert record.predicted_peak_bytes == sum(record.predicted_components.values())
    assert record.predicted_peak_bytes == sum(record.predicted_parts.values())
    assert record.start_bytes > 0
    assert record.measured_peak_bytes > 0
    assert record.seconds == pytest.approx(record.tokens / record.tokens_per_s)
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_a_dry_run(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["tune", str(tiny), "--data", str(rows_file), "--out", str(out), "--memory", "64GiB", "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    for text in ("dry run", "chosen", "memory, trial", "memory, predicted", "  weights", "tokens/s", "steps"):
        assert text in shown.stdout
    record = json.loads(CliRunner().invoke(app, [*command, "--json", "--quiet"]).stdout)
    assert record["fit"]["budget_bytes"] == ROOMY
    assert not out.exists()
