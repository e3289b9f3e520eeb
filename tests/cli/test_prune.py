"""prune from the command line: its JSON, its table, its exit codes, and options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli


def test_json_has_what_is_promised_and_the_gate_its_exit_code(cli: Cli, merged: Path, tmp_path: Path) -> None:
    record = cli(
        "prune", merged, "--out", tmp_path / "p", "--sparsity", 0.05, "--max-kl", 9, "--min-agreement", 0, "--json"
    ).json
    promised = {"seconds", "peak_memory_bytes", "disk_bytes", "sparsity", "layers", "gate", "speed", "recovery"}
    assert promised <= record.keys()
    assert {"name", "error", "sparsity", "dense_columns"} <= record["layers"][0].keys()
    assert record["gate"]["verdict"] == "pass"
    assert "neither smaller nor faster" in record["speed"]
    done = cli("prune", merged, "--out", tmp_path / "f", "--method", "magnitude", "--sparsity", 0.8)
    done.fails(4, "worst layers", "--method sparsegpt")
    assert (tmp_path / "f" / "burnish.json").is_file()


def test_table_of_a_pattern_with_recovery(cli: Cli, merged: Path, tmp_path: Path) -> None:
    words = ["--sparsity", "2:4", "--recover", 3, "--rank", 4, "--batch-size", 4, "--max-kl", 9, "--min-agreement", 0]
    done = cli("prune", merged, "--out", tmp_path / "p", *words)
    assert done.code == 0, done.err
    for part in ("2:4", "50.0 %", "3 steps", "zeros are stored", "pass"):
        assert part in done.out


def test_structured_from_the_command_line(cli: Cli, merged: Path, tmp_path: Path) -> None:
    words = ["--method", "structured", "--layers", 1, "--channels", 0.25, "--max-kl", 99, "--min-agreement", 0]
    record = cli("prune", merged, "--out", tmp_path / "p", *words, "--json").json
    assert record["parameters"] < record["parent_parameters"]
    assert cli("generate", tmp_path / "p", "--prompt", "SELECT", "--max-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "best"], "unknown pruning method"),
        (["--sparsity", "most"], "sparsity is not known"),
        (["--sparsity", "4:4"], "pattern is not valid"),
        (["--method", "structured"], "there is nothing to remove"),
        (["--method", "structured", "--sparsity", "0.5"], "structured takes no sparsity"),
        (["--heads", "0.5"], "have no meaning for sparsegpt"),
        (["--rank", "4"], "--rank without --recover"),
        (["--method", "wanda", "--damping", "0.1"], "wanda has no damping"),
        (["--method", "magnitude", "--samples", "8"], "magnitude takes no calibration rows"),
        (["--recover", "-1"], "recover is out of range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cli: Cli, merged: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    cli("prune", merged, "--out", tmp_path / "p", *words).fails(2, message)
    assert not (tmp_path / "p").exists()
