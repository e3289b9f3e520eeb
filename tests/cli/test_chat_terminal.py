"""`burnish chat` in a pseudo-terminal, as a person meets it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
