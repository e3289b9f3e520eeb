"""The spool: everything that a run tells MLflow, first written beside the run, from where it is sent.

A spool is a folder: `events.jsonl`, in the form of `jsonl.py` and only ever appended to; `files/`, hard links to files
that wait to be uploaded (they stay as they were when the run moves on, and cost no space); `sent-*.json`, how far a
destination is known to have it. Locks tell whether a process still writes and whether one is sending.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from burnish.track.jsonl import lacks_newline, plain

EVENTS_NAME = "events.jsonl"
SUFFIX = ".track"
_READ_BYTES = 4 << 20
_SKIPPED_FOLDERS = ("checkpoints", "__pycache__")


class SpoolWriter:
    """Appends events; threads may share it.

    Args:
        folder: the spool's, made when it is opened.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._held: BinaryIO | None = None
        self._num_files = 0

    def open(self, first: dict[str, Any] | None) -> None:
        """Begin, with a first line, or go on where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = hold(self.folder / "writer.lock")
        path = self.folder / EVENTS_NAME
        cut = path.exists() and lacks_newline(path)
        self._file = path.open("ab")
        if cut:
            self._file.write(b"\n")  # a crash cut the last line; it stays as one bad line
        if first is not None:
            self.write("spool", "", **first)

    def write(self, event: str, run: str, **values: Any) -> None:
        """Append one line; it is the system's when this returns, so that no crash of this process loses it."""
        with self._lock:
            if self._file is None:
                return
            record = {"event": event, "run": run, "time": round(self._clock(), 3), **values}
            line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()

    def keep(self, path: Path) -> str:
        """Link a file, or a folder's files, into the spool; the place there, relative to it.

        Checkpoints and hidden files of a folder are left out. Where links are not possible files are copied.
        """
        place = self._place(path.resolve().name)
        target = self.folder / place
        if path.is_dir():
            for file in files_of(path):
                _link(file, target / file.relative_to(path))
        else:
            _link(path, target)
        return str(place)

    def keep_text(self, name: str, text: str) -> str:
        """As `keep`, of a file that is made here."""
        place = self._place(name)
        (self.folder / place).parent.mkdir(parents=True)
        (self.folder / place).write_text(text, encoding="utf-8")
        return str(place)

    def _place(self, name: str) -> Path:
        with self._lock:
            self._num_files += 1
            return Path("files") / f"{self._num_files}-{secrets.token_hex(3)}" / name

    def sync(self) -> None:
        """Have the disk hold what was written; writing goes on meanwhile."""
        with self._lock:
            if self._file is None:
                return
            descriptor = os.dup(self._file.fileno())
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nothing is written after this."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._held is not None:
                self._held.close()
                self._held = None


@dataclass
class SpoolState:
    """How far a destination has a spool.

    Attributes:
        destination: shown to people.
        offset: bytes of events.jsonl that are known to be there.
        experiment_id: of the destination.
        runs: the destination's ids, by the spool's.
        refused: what the destination will not take, and why; it is left out.
        uploading: files are on their way.
        failures: attempts in a row that failed.
        error: why the last one did.
    """

    destination: str = ""
    offset: int = 0
    experiment_id: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    uploading: bool = False
    failures: int = 0
    error: str | None = None


def read_state(spool: Path, name: str) -> SpoolState:
    """The state of a destination; an empty one where there is none, or where it cannot be read."""
    try:
        record = json.loads((spool / f"sent-{name}.json").read_text(encoding="utf-8"))
        return SpoolState(**{item.name: record[item.name] for item in fields(SpoolState)})
    except (OSError, ValueError, KeyError, TypeError):
        return SpoolState()


def write_state(spool: Path, name: str, state: SpoolState) -> None:
    """Replace the state; a reader sees the old one or the new one."""
    path = spool / f"sent-{name}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(state)), encoding="utf-8")
    os.replace(temporary, path)


def read_events(spool: Path, offset: int, *, most: int = _READ_BYTES) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from a byte on, each with the byte after it; lines that a crash cut are passed over.

    At most about `most` bytes are read, and always one whole line where there is one.
    """
    with (spool / EVENTS_NAME).open("rb") as file:
        file.seek(offset)
        start = offset
        while offset - start < most:
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "event" in record and "run" in record:
                yield record, offset


def first_event(spool: Path) -> dict[str, Any]:
    """What the spool says of itself: its key and its destination; empty where it says nothing."""
    with contextlib.suppress(OSError):
        for event, _ in read_events(spool, 0, most=1):
            return event if event["event"] == "spool" else {}
    return {}


def find_spools(path: Path) -> list[Path]:
    """The spools that a path stands for: itself, those beside it (`path.track`), or those below it; oldest first."""
    if (path / EVENTS_NAME).is_file():
        return [path]
    beside = path.parent / f"{path.resolve().name}{SUFFIX}"
    found = {file.parent for place in (path, beside) if place.is_dir() for file in place.glob(f"*/{EVENTS_NAME}")}
    if path.is_dir():
        found |= {file.parent for file in path.glob(f"**/*{SUFFIX}/*/{EVENTS_NAME}")}
    return sorted(found)


def files_of(folder: Path) -> list[Path]:
    """Files of a model's folder that belong to the model."""
    found = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in parts)
        if file.is_file() and not hidden:
            found.append(file)
    return found


def hold(path: Path) -> BinaryIO | None:
    """Take a lock that ends with the process; None where another one has it."""
    import fcntl

    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


@contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold a lock for a block, if it is free."""
    file = hold(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            file.close()


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy2(file, target)
