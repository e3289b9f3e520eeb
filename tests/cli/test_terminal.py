"""Chat and progress bars in a pseudo-terminal, as a person meets them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Cli

pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals need pexpect")

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A running chat; `shown` collects what a person would read."""

    def __init__(self, *arguments: object, columns: int = 100) -> None:
        command = ["-m", "burnish.cli.main", "chat", *map(str, arguments)]
        self.process = pexpect.spawn(
            sys.executable, command, timeout=60, encoding="utf-8", dimensions=(30, columns), echo=True
        )

    def wait_for_prompt(self) -> str:
        self.process.expect(r"(?:\x1b\[[0-9;?]*[a-zA-Z])*> (?:\x1b\[[0-9;?]*[a-zA-Z])*$")
        return CONTROL.sub("", self.process.before)

    def ask(self, text: str) -> str:
        self.process.sendline(text)
        return self.wait_for_prompt()


@pytest.fixture
def chat() -> Iterator:
    opened: list[Terminal] = []

    def start(*arguments: object, **settings) -> Terminal:
        opened.append(Terminal(*arguments, **settings))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.process.close(force=True)


def test_prompt_answer_figures_and_ctrl_d(chat, merged: Path) -> None:
    terminal = chat(merged, "--max-tokens", 8)
    opening = terminal.wait_for_prompt()
    assert "native engine" in opening
    assert "/help" in opening
    shown = terminal.ask("How many ships are there?")
    lines = [line for line in shown.replace("\r", "").split("\n") if line.strip()]
    assert lines[0].endswith("How many ships are there?")
    assert len(lines) >= 3, lines
    for part in ("tokens in", "TTFT", "TPOT", "tokens/s", "peak memory"):
        assert part in shown
    assert "1 answer, " in terminal.ask("/stats")
    terminal.process.sendeof()
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0
    assert "Traceback" not in terminal.process.before


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, merged: Path) -> None:
    terminal = chat(merged, "--max-tokens", 200, "--no-kv-cache", "--temperature", 3, "--seed", 1)
    terminal.wait_for_prompt()
    for _ in range(3):  # an answer may end by itself before the signal arrives
        terminal.process.sendline("Tell me about every ship there ever was.")
        terminal.process.expect(r"was\.\r\n.{12}")
        terminal.process.sendintr()
        shown = terminal.wait_for_prompt()
        if "stopped after" in shown:
            break
    assert "stopped after" in shown
    assert "How many?" in terminal.ask("How many?")
    terminal.process.sendintr()
    assert "leaves" in terminal.wait_for_prompt()
    terminal.process.sendline("/quit")
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0


def test_errors_are_told_and_the_conversation_goes_on(chat, merged: Path) -> None:
    terminal = chat(merged, "--max-tokens", 4)
    terminal.wait_for_prompt()
    terminal.process.sendline("/context " + "ship " * 600)
    terminal.wait_for_prompt()
    shown = terminal.ask("How many?")
    assert "error: " in shown
    assert "256" in shown
    terminal.ask("/context")
    assert "TTFT" in terminal.ask("How many?")


def test_ctrl_c_during_tuning_saves_the_adapter_and_exits_130(
    cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["-m", "burnish.cli.main", "tune", tiny, "--data", rows_file, "--out", out]
    command += ["--steps", 1_000_000, "--micro-batch-size", 2]
    process = pexpect.spawn(sys.executable, list(map(str, command)), timeout=60, encoding="utf-8", dimensions=(30, 100))
    process.expect("Tuning on 24 rows")  # the bar comes with a step that is done
    process.sendintr()
    process.expect("interrupted")
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130
    assert "Traceback" not in process.before
    assert cli("generate", out, "--prompt", "SELECT", "--max-tokens", 2).code == 0


def test_answers_and_the_bar_do_not_run_into_each_other(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("SELECT name\n" * 300)
    command = ["-m", "burnish.cli.main", "generate", merged, "--prompts", tmp_path / "prompts.txt"]
    command += ["--max-tokens", 40, "--ignore-eos", "--concurrency", 2, "--speculation", "off"]
    # On torch it takes long enough for a bar to be drawn.
    slow = {**os.environ, "BURNISH_CPU_KERNELS": "off"}
    process = pexpect.spawn(
        sys.executable, list(map(str, command)), timeout=60, encoding="utf-8", dimensions=(30, 400), env=slow
    )
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    shown = process.before
    assert "Generating" in shown, "too quick for a bar: the test says nothing"
    lines = [line for line in CONTROL.sub("", shown).replace("\r", "\n").split("\n") if "[" in line]
    assert not [line for line in lines if "Generating" in line and re.search(r"\[\d+\] ", line)]
