"""Gates on the command line: the task beside the parent's, verdicts of `eval --against`, and reports of a child."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli

ROWS = ["--data", "text-to-sql:test:4", "--max-tokens", 4]


@pytest.fixture(scope="module")
def child(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from burnish.compress.config import QuantizeConfig
    from burnish.pipeline.gates import GateOptions
    from burnish.pipeline.quantize import quantize

    out = tmp_path_factory.mktemp("child") / "q8"
    config = QuantizeConfig(method="rtn", bits=8, group_size=16)
    quantize(str(merged), out=out, config=config, gate_options=GateOptions(rows=4, min_agreement=0.0))
    return out


def test_quantize_tells_both_scores(cli: Cli, merged: Path, tmp_path: Path) -> None:
    options = ["--method", "rtn", "--bits", 8, "--group-size", 16, "--gate-rows", 4, "--min-agreement", 0]
    done = cli("quantize", merged, "--out", tmp_path / "q", *options)
    assert done.code == 0
    assert "0 lost" in done.out
    assert "execution accuracy" in done.out
    manifest = json.loads((tmp_path / "q" / "burnish.json").read_text())
    assert manifest["gate"]["task"]["num_rows"] == 4


def test_a_limit_that_is_broken_ends_with_4_and_marks_the_child(cli: Cli, merged: Path, tmp_path: Path) -> None:
    options = ["--method", "rtn", "--bits", 8, "--group-size", 16, "--gate-rows", 0, "--max-kl-p99", 0]
    done = cli("quantize", merged, "--out", tmp_path / "q", *options)
    done.fails(4, "p99 KL is", "marked as failed", "worst layers: model.layers.", "--method gptq")
    assert json.loads((tmp_path / "q" / "burnish.json").read_text())["gate"]["verdict"] == "fail"


def test_eval_of_a_child_beside_its_parent_passes_or_ends_with_4(
    cli: Cli, child: Path, merged: Path, tmp_path: Path
) -> None:
    record = cli("eval", child, *ROWS, "--against", merged, "--json").json
    assert record["gate"]["verdict"] == "pass"
    assert record["gate"]["task"]["num_rows"] == 4
    page = tmp_path / "beside.html"
    done = cli("eval", child, *ROWS, "--against", merged, "--max-kl", 0, "--report", page, "--quiet")
    done.fails(4, "mean KL is", "worst layers")
    assert "fail" in done.out
    assert "child failed its gate" in page.read_text()


def test_eval_beside_another_model_judges_by_given_limits_alone(cli: Cli, tiny: Path, merged: Path) -> None:
    assert cli("eval", merged, *ROWS, "--against", tiny, "--json").json["gate"] is None
    done = cli("eval", merged, *ROWS, "--against", tiny, "--max-kl", 0, "--json")
    assert done.code == 4
    assert done.json["gate"]["verdict"] == "fail"


def test_report_of_a_child(cli: Cli, child: Path, tmp_path: Path) -> None:
    done = cli("report", child, "--format", "md")
    assert "| parent |" in done.out
    assert "passed its gate" in done.out
    assert cli("report", child, "--out", tmp_path / "child.html").code == 0
    assert "parent" in (tmp_path / "child.html").read_text()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--max-kl", 1], "need a parent"),
        (["--against", "burnish-sql-base", "--report", "x.txt"], "no known ending"),
        (["--against", "burnish-sql-base", "--min-agreement", 2], "min_greedy_agreement is out of range"),
    ],
)
def test_what_eval_cannot_do_is_one_line(cli: Cli, merged: Path, options: list[object], part: str) -> None:
    cli("eval", merged, *ROWS, *options).fails(2, part)
