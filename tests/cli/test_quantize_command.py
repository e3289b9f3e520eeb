"""The options of `burnish quantize` that change what is rounded: methods, rotation and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli

LENIENT = ["--group-size", 16, "--min-agreement", 0, "--max-kl", 9]


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_scaled_child_is_written_and_runs(cli: Cli, merged: Path, tmp_path: Path, method: str) -> None:
    record = cli("quantize", merged, "--out", tmp_path / "q", "--method", method, *LENIENT, "--json").json
    assert (record["method"], record["bits"], record["widths"]) == (method, 4, {})
    assert record["calibration_tokens"] > 0
    manifest = json.loads((tmp_path / "q" / "burnish.json").read_text())
    assert manifest["config"]["method"] == method
    assert cli("generate", tmp_path / "q", "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_rotated_child_is_written_and_runs(cli: Cli, merged: Path, tmp_path: Path) -> None:
    record = cli("quantize", merged, "--out", tmp_path / "q", "--bits", 8, "--rotate", *LENIENT, "--json").json
    assert record["gate"]["kl_mean"] < 1e-3
    assert cli("generate", tmp_path / "q", "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_target_bits_choose_the_width_of_each_linear(cli: Cli, merged: Path, tmp_path: Path) -> None:
    done = cli("quantize", merged, "--out", tmp_path / "q", "--target-bits", 7.5, *LENIENT, "--json")
    record = done.json
    assert 6.5 < record["bits_per_weight"] <= 7.5
    assert len(record["widths"]) == len(record["layers"])
    assert set(record["widths"].values()) <= {2, 3, 4, 8}
    manifest = json.loads((tmp_path / "q" / "burnish.json").read_text())
    assert manifest["config"]["mixed_precision"]["target_bits"] == 7.5
    assert cli("generate", tmp_path / "q", "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_largest_size_is_kept_and_shown(cli: Cli, merged: Path, tmp_path: Path) -> None:
    dense = (merged / "model.safetensors").stat().st_size
    embeddings = 2 * 3072 * 32 * 4
    limit = embeddings + (dense - embeddings) // 3
    done = cli("quantize", merged, "--out", tmp_path / "q", "--method", "rtn", "--max-size", str(limit), *LENIENT)
    assert done.code == 0
    assert "mixed bits (" in done.out
    assert (tmp_path / "q" / "model.safetensors").stat().st_size <= limit


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--bits", 4, "--target-bits", 5], ["--bits and a budget are both given"]),
        (["--target-bits", 5, "--max-size", "1GiB"], ["mixed precision takes one budget"]),
        (["--max-size", "large"], ["--max-size is not a size"]),
        (["--target-bits", 1], ["the budget is too small", "bits per weight"]),
    ],
)
def test_budget_that_cannot_be_kept_is_one_line(
    cli: Cli, merged: Path, tmp_path: Path, options: list[object], parts: list[str]
) -> None:
    cli("quantize", merged, "--out", tmp_path / "q", *options, *LENIENT).fails(2, *parts)
