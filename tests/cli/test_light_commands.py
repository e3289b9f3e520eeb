"""plan, doctor and data inspect: they look, and load no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli

from burnish.models.loading import load_config
from tiny_llama import write_json

SCRIPT = """
import sys
from burnish.cli.main import run
code = run(sys.argv[1:])
heavy = sorted(name for name in ("torch", "transformers", "matplotlib", "peft") if name in sys.modules)
print("heavy:", ",".join(heavy), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "mistral-7b", "--device", "t4"],
        ["plan", "TINY"],
        ["doctor"],
        ["data", "inspect", "ROWS"],
        ["runs", "ls", "--json"],
        ["report", "RUN"],
        ["generate", "--help"],
    ],
)
def test_light_command_imports_nothing_heavy(
    arguments: list[str], tiny: Path, rows_file: Path, run_folder: Path
) -> None:
    places = {"TINY": str(tiny), "ROWS": str(rows_file), "RUN": str(run_folder)}
    command = [sys.executable, "-c", SCRIPT, *(places.get(word, word) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "heavy: \n"


def test_plan_counts_the_parameters(cli: Cli, tiny: Path) -> None:
    record = cli("plan", tiny, "--json").json
    config = load_config(tiny)
    assert record["parameters"] == config.num_parameters()
    assert record["weight_bytes"]["float32"] >= 4 * config.num_parameters()
    assert record["kv_bytes_per_token"] == config.kv_bytes_per_token(4)
    names = [stage["name"] for stage in record["stages"]]
    assert {"load", "inference", "lora", "full", "quantize"} <= set(names)
    assert all(stage["peak_bytes"] >= max(stage["components"].values()) for stage in record["stages"])


def test_plan_requires_inference_of_all_cards_together(cli: Cli) -> None:
    words = ("plan", "mistral-7b", "--device", "t4", "--concurrency", 64, "--require")
    cli(*words, "inference").fails(3, "inference")
    assert cli(*words, "inference", "--cards", 2).code == 0
    cli(*words, "lora", "--cards", 2).fails(3, "lora")


def test_plan_table_fits_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("plan", "mistral-7b", "--device", "t4")
    assert done.code == 0
    assert "no" in done.out
    table = [line for line in done.out.splitlines() if line.startswith(("stage ", "load ", "lora ", "full "))]
    assert table
    assert all(len(line) <= 80 for line in table)


def test_doctor_finds_python_and_the_bundled_model(cli: Cli) -> None:
    done = cli("doctor", "--json")
    checks = done.json
    assert {"group", "name", "status", "detail"} <= checks[0].keys()
    assert any(check["name"] == "torch" and check["status"] == "ok" for check in checks)
    assert any(check["name"] == "burnish-sql-base" for check in checks)
    assert "Python" in cli("doctor").out or "python" in cli("doctor").out


def test_inspect_marks_what_is_learned(cli: Cli, rows_file: Path) -> None:
    record = cli("data", "inspect", rows_file, "--rows", 2, "--json").json
    assert len(record["rows"]) == 2
    for row, answer in zip(record["rows"], ("SELECT COUNT(*) FROM ship", "SELECT name FROM ship")):
        learned = "".join(text for text, is_learned in row["segments"] if is_learned)
        assert learned.startswith(answer)
        assert "How" not in learned
    assert record["template"] == "chat"
    done = cli("data", "inspect", rows_file, "--rows", 1)
    assert "SELECT COUNT(*) FROM ship" in done.out
    assert "learned" in done.out


def test_inspect_shows_bad_rows_with_their_numbers(cli: Cli, tmp_path: Path) -> None:
    row = {"question": "How many?", "context": "CREATE TABLE t (a INTEGER);", "answer": "SELECT COUNT(*) FROM t"}
    path = write_json(tmp_path / "rows.json", [row, {**row, "answer": None}, row])
    done = cli("data", "inspect", path)
    assert done.code == 0
    assert "rows.json" in done.out
    assert "row 2" in done.out.replace("\n", " ")


@pytest.mark.parametrize("template", ["chat", "alpaca", "sql-context"])
def test_inspect_renders_every_template(cli: Cli, rows_file: Path, template: str) -> None:
    record = cli("data", "inspect", rows_file, "--template", template, "--rows", 1, "--json").json
    assert record["template"] == template
    assert "CREATE TABLE ship" in "".join(text for text, _ in record["rows"][0]["segments"])


def test_inspect_refuses_an_unknown_way_with_long_rows(cli: Cli, rows_file: Path) -> None:
    cli("data", "inspect", rows_file, "--too-long", "cut").fails(2, "cut", "truncate")


def test_inspect_reads_columns_by_name(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("ask,reply\nHow many?,SELECT 1\n")
    record = cli("data", "inspect", tmp_path / "rows.csv", "--columns", "instruction=ask,answer=reply", "--json").json
    assert "SELECT 1" in json.dumps(record["rows"])


def test_inspect_refuses_a_negative_number_of_rows(cli: Cli) -> None:
    cli("data", "inspect", "text-to-sql:train:4", "--rows", -1).fails(2, "--rows is out of range", "0 or more")
