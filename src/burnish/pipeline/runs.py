"""Where runs are kept: one folder each, with run.json as the truth and everything the run made beside it."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path

from burnish.errors import ConfigError
from burnish.measure.run_record import RunRecord, read_run
from burnish.models.atomic_files import write_text

RUN_NAME = "run.json"
MANIFEST_NAME = "burnish.json"


def runs_folder() -> Path:
    """BURNISH_RUNS, or `runs` in the current folder."""
    return Path(os.environ.get("BURNISH_RUNS") or "runs")


def new_run_folder(name: str, *, out: str | None = None) -> Path:
    """A fresh folder for a run, named by time; or `out`, which must be empty or new.

    Raises:
        ConfigError: it cannot be made, or holds something.
    """
    if out is not None:
        folder = Path(out)
    else:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = runs_folder() / f"{stamp}-{re.sub(r'[^a-z0-9-]+', '-', name.lower())}"
        number = 1
        while folder.exists():
            number += 1
            folder = folder.with_name(f"{stamp}-{name}-{number}")
    if folder.is_file():
        raise ConfigError(f"--out {folder} is a file", expected="a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run's folder {folder} cannot be made: {error.strerror}") from error
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", remedy="Choose another --out.")
    return folder


def save_run(folder: Path, run: RunRecord) -> None:
    """Write run.json, through a temporary name."""
    write_text(folder / RUN_NAME, json.dumps(run.to_dict(), indent=1, ensure_ascii=False) + "\n")


def list_runs() -> list[Path]:
    """Folders with a run.json, oldest first."""
    folder = runs_folder()
    found = [path.parent for path in folder.glob(f"*/{RUN_NAME}")] if folder.is_dir() else []
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def newest_run() -> Path:
    """The run last written.

    Raises:
        ConfigError: there is none.
    """
    runs = list_runs()
    if not runs:
        raise ConfigError(f"there is no run in {runs_folder()}", remedy="Make one with: burnish demo")
    return runs[-1]


def find_run(name: str) -> Path:
    """A run by its folder, by its run.json, or by its name in the runs' folder.

    Raises:
        DataError: there is none, as `read_run` says.
    """
    inside = runs_folder() / name
    return inside if not Path(name).exists() and inside.exists() else Path(name)


def load_runs(names: list[str]) -> list[RunRecord]:
    """Read runs, or children that were held against a parent; the newest run when no name is given."""
    return [_load(find_run(name)) for name in names] if names else [read_run(newest_run())]


def _load(path: Path) -> RunRecord:
    if (path / MANIFEST_NAME).is_file() and not (path / RUN_NAME).is_file():
        from burnish.pipeline.side_by_side import run_of_child  # slow to import

        return run_of_child(path)
    return read_run(path)
