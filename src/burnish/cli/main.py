"""The `burnish` program: its commands, and what an error looks like. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer

from burnish.cli import (
    command_compare,
    command_export,
    command_prune,
    command_quantize,
    command_queue,
    command_serve,
    command_track,
    commands_make,
    commands_measure,
    commands_plan,
    commands_use,
)
from burnish.errors import BurnishError

UsageError: Any = typer.BadParameter.__base__  # Typer's own Click or the package, whichever this version uses
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")

app = typer.Typer(
    name="burnish",
    help="Make a language model fit your task, your hardware and your budget, and prove it with measurements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
)
for group in (
    commands_use,
    commands_make,
    command_quantize,
    command_prune,
    command_export,
    commands_measure,
    commands_plan,
    command_queue,
    command_serve,
    command_compare,
    command_track,
):
    group.register(app)


def _version(value: bool) -> None:
    if value:
        from burnish import __version__

        typer.echo(f"burnish {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with the code that cli errors promise."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. One line on stderr for any error, never a traceback."""
    try:
        # Not through Typer's own main, which would keep interrupts and broken pipes to itself.
        command = typer.main.get_command(app)
        words = list(sys.argv[1:] if arguments is None else arguments)
        with command.make_context("burnish", list(words), obj=words) as context:
            result = command.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BurnishError as error:
        return _fail(error.message, error.exit_code)
    except UsageError as error:
        return _usage(error)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        # The reader went away, as `| head` does; nothing is wrong. Keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("BURNISH_TRACEBACK"):
            raise
        return _unexpected(error)


def _usage(error: Any) -> int:
    """Say what is wrong with the command line; the bare program and groups show their help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())
        return 2
    message = error.format_message()
    if type(error).__name__ == "NoSuchOption":
        close = get_close_matches(error.option_name, error.possibilities or (), n=1)
        message = f"there is no option {error.option_name}." + (f" Did you mean {close[0]}?" if close else "")
    context = getattr(error, "ctx", None)
    where = f" See: {context.command_path} --help" if context is not None else ""
    return _fail(f"{message}{where}", 2)


def _unexpected(error: Exception) -> int:
    """Errors that no room claimed: memory, the system, and our own faults."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return _fail("ran out of memory. Use a smaller batch, a smaller --dtype or a quantized model.", 5)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'the system'}: {error.strerror or text}", 1)
    return _fail(f"{type(error).__name__}: {text}. Set BURNISH_TRACEBACK=1 to see where.", 1)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    sys.stdout.flush()
    print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
