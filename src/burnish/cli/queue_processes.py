"""`burnish queue work --workers N`: the same command line in N processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from burnish.cli.output import note
from burnish.plan.hardware import usable_cores


def supervise(
    words: Sequence[str],
    workers: int,
    *,
    threads: int | None,
    cards: int,
    quiet: bool,
    stopping: Callable[..., AbstractContextManager[None]],
) -> int:
    """Work with so many processes; returns the exit code.

    Args:
        words: this command line.
        threads: of each; its share of the cores when None.
        cards: that each has for itself; 0 where it takes none, or was told which.
        stopping: drains the processes at the first signal and ends them at the second, for the time of a block.
    """
    from burnish.scale.supervising import Supervisor, card_of

    share = max(1, usable_cores() // workers)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    supervisor = Supervisor(
        command=[*without_workers(words), "--threads", str(share if threads is None else threads)],
        count=workers,
        own=lambda number: card_of(number, visible=visible, each=cards) if cards else {},
        say=lambda text: note(text, quiet=quiet),
    )
    with stopping(supervisor, quiet=quiet):
        return supervisor.run()


def without_workers(words: Sequence[str]) -> list[str]:
    """The command line of one worker."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--workers":
            skip = True
        elif not word.startswith("--workers="):
            kept.append(word)
    return [*kept, "--workers", "1"]
