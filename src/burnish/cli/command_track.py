"""The commands of experiment tracking: replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli import options
from burnish.cli.output import counted, note, print_json
from burnish.errors import BurnishError


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="What a tracking server has of the runs.")
    group.command(short_help="Send what a tracking server has missed.")(replay)
    app.add_typer(group, name="track")


def replay(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="What a run wrote, its .track folder, or a folder with several.", show_default=False
        ),
    ],
    track: Annotated[
        str | None, typer.Option("--track", metavar="URI", help="Instead of where each run was tracked to.")
    ] = None,
    config: options.Config = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare what runs had to say with what MLflow has, and send the rest; nothing is sent twice.

    Exit 1 if MLflow cannot be reached, refuses something, or a file that is to be sent is gone.
    """
    from burnish.track.replay import replay as run

    done = run(path, track)
    if json:
        print_json(done)
    for one in done:
        place = one.url or one.destination
        told = f"{one.sent} settings, figures and files sent, {one.there} were there already"
        note(f"{place}: {told}", quiet=quiet or json)
        for line in one.refused:
            note(f"refused: {line}", quiet=quiet)
        for line in one.missing:
            note(f"gone: {line}", quiet=quiet)
    lost = sum(len(one.refused) + len(one.missing) for one in done)
    if lost:
        raise BurnishError(f"{counted(lost, 'thing')} could not be sent")
