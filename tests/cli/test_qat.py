"""quantize --qat from the command line: its JSON, its table, and options that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli

LENIENT = ["--group-size", 16, "--min-agreement", 0, "--max-kl", 9, "--gate-rows", 0, "--max-kl-p99", 99]
TRAINED = ["--bits", 2, "--qat", 4, "--rank", 4, "--batch-size", 4]


def test_json_has_the_training_and_its_curve(cli: Cli, merged: Path, tmp_path: Path) -> None:
    record = cli("quantize", merged, "--out", tmp_path / "q", *TRAINED, *LENIENT, "--json").json
    assert record["qat"]["steps"] == len(record["qat"]["loss"]) == 4
    assert {"seconds", "tokens_per_s", "loss_before", "loss_after", "changed", "resumed_from"} <= record["qat"].keys()
    assert record["gate"]["verdict"] == "pass"
    assert cli("generate", tmp_path / "q", "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_table_says_what_was_trained(cli: Cli, merged: Path, tmp_path: Path) -> None:
    words = ["--method", "rtn", "--learn-labels", "--learning-rate", "0.001"]
    done = cli("quantize", merged, "--out", tmp_path / "q", *TRAINED, *words, *LENIENT)
    assert done.code == 0, done.err
    for part in ("trained", "4 steps", "of integers changed"):
        assert part in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", 4], "--rank without --qat"),
        (["--learn-labels"], "--learn-labels without --qat"),
        (["--qat", -1], "qat is out of range"),
        (["--qat", 4, "--method", "awq"], "awq cannot be trained further"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cli: Cli, merged: Path, tmp_path: Path, words: list[object], message: str
) -> None:
    cli("quantize", merged, "--out", tmp_path / "q", *words).fails(2, message)
    assert not (tmp_path / "q").exists()
