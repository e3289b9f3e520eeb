"""How commands speak: results on stdout, progress and notes on stderr. Torch-free."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from burnish.measure.json_values import to_plain

SHOW_AFTER_S = 2.0  # shorter work needs no bar
WIDE = 110  # columns from which on the bar has its full width
_WIDEST = 1 << 20
_TRAILING = re.compile(r" +(?=\n)")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n")


class _Stdout(Console):
    """Where it is no terminal, lines end where their text ends."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        self.file.write(_TRAILING.sub("", captured.get()))
        self.file.flush()


def stdout() -> Console:
    """For tables and text that are the result; what users wrote is never read as markup or emoji."""
    return _Stdout(highlight=False, markup=False, emoji=False)


def has_width(console: Console) -> bool:
    """Lines end somewhere: at the terminal's edge, or where COLUMNS says."""
    return console.is_terminal or "COLUMNS" in os.environ


def print_table(console: Console, table: Table, *, whole: bool = False) -> None:
    """A table as wide as the terminal; where nothing is known of one, or if it is to stay `whole`, as its cells."""
    if whole or not has_width(console):
        table.width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.print(table, crop=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


class _NoteColumn(ProgressColumn):
    """The task's note in one line, cut where the terminal ends; counts and times stay whole."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Watcher:
    """A progress bar on stderr that appears when work takes longer than `SHOW_AFTER_S`; nothing without a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = stderr()
        self._quiet = quiet
        self._enabled = not quiet and self._console.is_terminal
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        if not self._enabled or (self._progress is None and time.monotonic() - self._started < SHOW_AFTER_S):
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28 if self._console.width >= WIDE else 10),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                _NoteColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        if label not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._tasks[label] = self._progress.add_task(label, total=total, note=note)
        self._progress.update(self._tasks[label], completed=done, total=total, note=note)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line that stays, also where people want no notes."""
        (self._console if self._progress is None else self._progress.console).print(text, soft_wrap=True)

    def echo(self, text: str) -> None:
        """A result on stdout; the bar makes room for it where both are the same terminal."""
        if self._progress is not None:
            self._progress.stop()
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        if self._progress is not None:
            self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def watching(*, quiet: bool) -> Iterator[Watcher]:
    """A progress bar for the time of the block."""
    watcher = Watcher(quiet=quiet)
    try:
        yield watcher
    finally:
        watcher.close()


def counted(number: int, noun: str) -> str:
    """ "1 answer", "2 answers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def note(text: str, *, quiet: bool = False) -> None:
    """A line for people on stderr."""
    if not quiet:
        stderr().print(text, soft_wrap=True)
