"""What `tune`, `merge` and `data inspect` say: options by their names, one meaning of memory, what to do next."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import Cli

from burnish.measure import busy
from tiny_llama import sql_rows, write_json


@pytest.fixture
def tune(cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path):
    def call(*options: object, data: object = None):
        command = ["tune", tiny, "--data", data or rows_file, "--out", tmp_path / "out", "--rank", 2]
        return cli(*command, *options)

    return call


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--early-stopping", 2],
            ["--early-stopping needs evaluations", "--eval-every", "--eval-data or --eval-split"],
        ),
        (["--keep-best", "--early-stopping", 2], ["--keep-best and --early-stopping need evaluations during the run"]),
        (["--eval-every", 2], ["--eval-every needs rows for evaluation"]),
        (["--min-delta", 0.1], ["--min-delta needs --early-stopping"]),
        (["--steps", 0], ["--steps is out of range"]),
        (["--pack-to", 0], ["--pack-to is out of range", "at least 1"]),
        (["--alpha", -1], ["--alpha is out of range"]),
        (["--dropout", 1], ["--dropout is out of range"]),
        (["--checkpoint-every", 2], ["--checkpoint-every needs --gradient-checkpointing"]),
        (["--micro-batch-tokens", 64, "--no-packing"], ["--micro-batch-tokens needs --packing"]),
        (["--method", "full"], ["--rank is for adapters", "--method full"]),
        (["--schedule", "constant", "--min-rate", 0.1], ["--schedule", "--min-rate"]),
        (["--eval-split", 2.5], ["--eval-split", "a share below 1"]),
        (["--max-length", 1], ["--max-length is out of range"]),
    ],
)
def test_errors_name_the_options(tune, options: list[object], parts: list[str]) -> None:
    done = tune(*options)
    done.fails(2, *parts)
    assert not re.search(r"\b(tokens_per_step|early_stopping|eval_every|keep_best|micro_batch)", done.err)


def test_several_errors_are_told_together(tune) -> None:
    tune("--steps", 0, "--alpha", 0, "--learn", "first", "--early-stopping", 2).fails(
        2, "5 settings are wrong", "(1) --steps", "(2) --early-stopping", "(3) LoRA --alpha", "(4) --learn", "(5) "
    )


def test_settings_of_a_file_are_named_as_it_has_them(tune, tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text("pack_to: 0\nearly-stopping: 2\n")
    tune("--config", tmp_path / "tune.yaml", "--steps", -1).fails(
        2, "--steps", "pack_to in ", "early-stopping in ", "tune.yaml", "--eval-every"
    )


def test_memory_has_one_meaning_and_a_dry_run_counts_the_runs_tokens(tune, tmp_path: Path) -> None:
    settings = ["--steps", 4, "--gradient-accumulation", 2, "--micro-batch-size", 5, "--precision", "float32"]
    shown = tune(*settings, "--dry-run")
    planned = tune(*settings, "--dry-run", "--json").json
    record = tune(*settings, "--json").json
    assert planned["tokens"] == sum(step["tokens"] for step in record["steps"])
    assert planned["predicted_peak_bytes"] == record["predicted_peak_bytes"]
    assert planned["predicted_components"] == record["predicted_components"]
    assert shown.out.count("over the start") == 2
    assert "what --memory limits" in " ".join(shown.out.split())
    manifest = json.loads((tmp_path / "out" / "burnish.json").read_text())
    assert manifest["figures"]["predicted_peak_bytes"] == record["predicted_peak_bytes"]


def test_speed_says_which_steps_it_leaves_out(tune, cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    assert "tokens/s, without the first 2 steps" in " ".join(tune("--steps", 3).out.split())
    done = cli("tune", tiny, "--data", rows_file, "--out", tmp_path / "two", "--steps", 2)
    assert "without the first" not in done.out


def test_a_finished_run_in_the_way_is_described(tune, tmp_path: Path) -> None:
    assert tune("--steps", 1).code == 0
    out = str(tmp_path / "out")
    tune("--steps", 1).fails(
        2, f"{out} holds a run that is over", "lora on ", "steps taken: 1", f"burnish merge {out}", "--overwrite"
    )
    assert tune("--steps", 1, "--overwrite").code == 0


def test_merging_a_whole_model_says_that_it_is_one(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    cli("merge", tiny, "--out", tmp_path / "m").fails(2, "is a model already", f"burnish chat {tiny}")
    cli("merge", tmp_path / "no", "--out", tmp_path / "m").fails(2, "there is no folder")


def test_a_budget_that_is_too_small_names_one_that_works(tune) -> None:
    done = tune("--steps", 1, "--memory", "64MiB")
    done.fails(3, "nothing fits into 64 MiB", "is the smallest budget", "Python and its libraries take", "--max-length")
    (smallest,) = re.findall(r"As asked, (\d+MiB) is the smallest", done.err)
    assert tune("--steps", 1, "--memory", smallest, "--json").json["fit"]["budget_bytes"] == int(smallest[:-3]) << 20


@pytest.mark.parametrize("command", ["tune", "inspect"])
def test_a_line_that_is_no_json_stops_everything(tune, cli: Cli, tiny: Path, tmp_path: Path, command: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(sql_rows(1)[0])
    path.write_text(f"{good}\n{good[:-1]}\n{good}\n")
    done = tune("--steps", 1, data=path) if command == "tune" else cli("data", "inspect", path, "--model", tiny)
    done.fails(2, "rows.jsonl is not valid JSON in line 2", "Mend the line")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_template_that_needs_a_context_is_refused_without_one(tune, tmp_path: Path, streaming: list[str]) -> None:
    path = write_json(tmp_path / "rows.json", [{"instruction": "Name the colour.", "output": "green"}] * 3)
    tune("--steps", 1, "--template", "sql-context", *streaming, data=path).fails(
        2, "sql-context needs a context", "row 1"
    )


def test_a_busy_machine_is_mentioned_where_threads_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(busy.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(busy.os, "getloadavg", lambda: (4.0, 4.0, 4.0), raising=False)
    monkeypatch.setattr(busy, "busy_cores", lambda: 1.5)
    assert "1.5 of 2 cores" in str(busy.busy_warning(2))
    assert "--threads 1" in str(busy.busy_warning(2))
    assert busy.busy_warning(1) is None
    assert busy.busy_warning(2, device="cuda:0") is None
    monkeypatch.setattr(busy, "busy_cores", lambda: 0.2)
    assert busy.busy_warning(2) is None

    def fail() -> float:
        raise AssertionError("looked")

    monkeypatch.setattr(busy, "busy_cores", fail)
    monkeypatch.setattr(busy.os, "getloadavg", lambda: (0.1, 0.1, 0.1), raising=False)
    assert busy.busy_warning(2) is None


def test_busy_cores_are_between_none_and_all() -> None:
    assert 0 <= busy.busy_cores(0.05) <= (busy.os.cpu_count() or 1)
