"""Tables for a terminal and for a pipe: figures keep their units, lines end with their text."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from command_line import Cli
from rich.console import Console

from burnish.cli.show_plan import show_plan
from burnish.plan.planning import plan

_SIZE = re.compile(r"\d+(\.\d+)? (B|KiB|MiB|GiB)\b")


@pytest.mark.parametrize("columns", [72, 80, 100])
def test_plan_breaks_no_figure_and_no_line(columns: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=columns, force_terminal=True, color_system=None, highlight=False)
    planned = plan("burnish-sql-base")
    show_plan(console, planned)
    lines = screen.getvalue().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("stage"))
    for line in lines[head + 1 : head + 1 + len(planned.stages)]:
        assert len(_SIZE.findall(line)) >= 2, lines
        assert not line.rstrip().endswith(","), lines
        assert len(line) <= columns
    assert not [line for line in lines if re.match(r"\s*([KMGT]iB|B)\b", line)], lines


def test_lines_of_a_pipe_are_whole_and_end_with_their_text(
    cli: Cli, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    planned = cli("plan", "burnish-sql-base").out
    rows = planned[planned.index("\nstage") :].splitlines()[2:]
    assert len(_SIZE.findall(rows[0])) == 4, planned
    merged = cli("merge", adapter, "--out", tmp_path / "m").out
    for shown in (planned, merged, cli("doctor").out):
        assert all(line == line.rstrip() for line in shown.splitlines()), shown
    assert re.search(r"^memory, peak .*\(predicted .*measured/predicted .*\)$", merged, re.MULTILINE), merged
