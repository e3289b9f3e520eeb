"""Scripts that take turns, each in its own environment: what one needs, how it is run, and what is kept of it.

A script prints one line, RESULT and JSON; records are written whole after every turn, so that a run that is stopped
has lost nothing but the turn it was in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def first_missing(python: str, paths: Iterable[str]) -> str | None:
    """What a script needs and this machine lacks, as written: its interpreter, or a path with variables in it."""
    if shutil.which(os.path.expandvars(python)) is None:
        return python
    return next((path for path in paths if not Path(os.path.expandvars(path)).exists()), None)


def run_for_result(command: Sequence[str], *, threads: int, timeout: float) -> dict[str, Any] | str:
    """The script's result, or the end of what it said when it gave none; variables in `command` are filled in."""
    # Libraries that size their thread pools by themselves get the same number; nothing is fetched.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [os.path.expandvars(part) for part in command],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no result within {timeout:.0f} s"
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    line = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or line is None:
        return (done.stderr or done.stdout).strip()[-2000:] or f"ended with {done.returncode}, without a word"
    return json.loads(line.group(1))


def write_record(out: Path, record: dict[str, Any], text: str) -> None:
    """Write the record and, beside it, the same in Markdown; each file whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((out, json.dumps(record, indent=1) + "\n"), (out.with_suffix(".md"), text)):
        pending = path.with_name(path.name + ".tmp")
        pending.write_text(content, encoding="utf-8")
        pending.replace(path)
