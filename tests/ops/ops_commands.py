"""Command lines of `burnish` out of files, and whether the program has what they name."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from burnish.cli.main import app

_CODE = re.compile(r"`(burnish [^`]+)`")


@functools.cache
def _program() -> Any:
    return typer.main.get_command(app)


def unknown_words(words: Sequence[str]) -> list[str]:
    """Commands and options among these words that the program does not have; words come after `burnish`."""
    command = _program()
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return [word for word in rest if word.startswith("-") and word != "-" and word.partition("=")[0] not in known]


def command_lines(text: str) -> Iterator[list[str]]:
    """Words after `burnish` of each command in a Markdown text: in indented code and between backticks."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        indented = line.startswith("    ")
        found = [line.strip()] if indented else _CODE.findall(line)
        for each in found:
            plain = each.split(" #")[0].removeprefix("$ ")
            for part in re.split(r"[|;]|&&", plain):
                words = _split(part)
                if "burnish" in words[:1] and words[1:2] != ["COMMAND"]:
                    yield _command(words[1:])
                elif words[:2] == ["docker", "compose"] and words[2:3] in (["run"], ["exec"]):
                    yield from _in_container(words[3:])


def _in_container(words: list[str]) -> Iterator[list[str]]:
    """After `docker compose run`: options, a service, and what it is to run."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    if rest[0] in ("api", "worker") and len(rest) > 1 and rest[1] != "python":
        yield _command(rest[2:] if rest[1] == "burnish" else rest[1:])


def _command(words: list[str]) -> list[str]:
    """Without redirections, placeholders in brackets and dots."""
    cut = next((place for place, word in enumerate(words) if word[:1] in "<>&" or word == "..."), len(words))
    return [word.strip("[]") for word in words[:cut]]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def documents(repository: Path) -> list[Path]:
    """Texts whose commands have to be right."""
    return [*sorted((repository / "docs").glob("*.md")), repository / "README.md", repository / "CONTRIBUTING.md"]
