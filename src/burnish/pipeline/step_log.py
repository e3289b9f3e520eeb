"""steps.jsonl in the folder of a tuning run: a line per step, evaluation and checkpoint, there to read while it runs.

Every line is a JSON object with "event" ("step", "evaluation" or "saving") and "step"; the other keys are the fields of
`StepRecord` and `EvalRecord`. Lines are appended and flushed one by one, so a crash cuts off the last one at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any

from burnish.errors import DataError
from burnish.measure.json_values import to_plain
from burnish.models.atomic_files import replacing
from burnish.train.results import EvalRecord, StepRecord

LOG_NAME = "steps.jsonl"


class StepLog:
    """Appends to a file, which is opened with the first line; a disk that fails stops the log and not the run.

    Args:
        path: the file; its folder is made.
        after_step: the step that a resumed run goes on from: lines of later steps, which it takes again, are dropped. 0
            begins anew.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self.path = path
        self.broken: str | None = None
        self._after_step = after_step
        self._file: BufferedWriter | None = None

    def step(self, record: StepRecord) -> None:
        """A step is done."""
        self._write("step", to_plain(record))

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done."""
        self._write("evaluation", to_plain(record))

    def saving(self, step: int, path: Path, seconds: float) -> None:
        """A checkpoint, or the result, is written."""
        self._write("saving", {"step": step, "path": str(path), "seconds": seconds})

    def close(self) -> None:
        """Close the file; nothing is written after this."""
        if self._file is None:
            return
        try:
            self._file.close()  # which tries once more to write what did not go out
        except OSError as error:
            self._give_up(error)
        self._file = None

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        if self.broken is not None:
            return
        line = json.dumps({"event": event, **fields}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.broken = f"{self.path} cannot be written: {error.strerror or error}; the run goes on without it"

    def _open(self) -> BufferedWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_step_log(self.path) if self._after_step and self.path.exists() else []
        with replacing(self.path) as file:
            for record in kept:
                if record["step"] <= self._after_step:
                    file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return self.path.open("ab")


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """All lines, oldest first; what a crash cut off is passed over.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=error.strerror or error) from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "event" in record:
            records.append(record)
    return records
