"""Trains a tiny adapter again and again, each time killed with SIGKILL at seeded moments and resumed, until it is done.

    python killed_runs.py FOLDER KILLS

A moment is a call, Python's or C's, counted from the start of `train` or, for every second kill, within saves. Each try
is a forked process, which spares the imports. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_run import fingerprint, tiny_rows, tiny_train

from burnish.train.checkpoints import CheckpointFolder
from burnish.train.results import TrainResult

SETTINGS: dict[str, Any] = {"steps": 11, "save_every": 2, "eval_every": 3, "keep_best": True}


class Moments:
    """Counts calls; at one of them the process is no more."""

    def __init__(self, *, kill_at: int | None, in_save: bool) -> None:
        self.kill_at, self.in_save = kill_at, in_save
        self.all = self.saving = self.inside = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.all += 1
        self.saving += bool(self.inside)
        if self.kill_at is not None and self.kill_at == (self.saving if self.in_save else self.all):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, *arguments: Any, **options: Any) -> bool:
        self.inside += 1
        try:
            return _save(*arguments, **options)
        finally:
            self.inside -= 1


_save = CheckpointFolder.save


def attempt(folder: Path, moments: Moments) -> TrainResult:
    """Train until the end or the fatal moment, from the newest checkpoint if there is one."""
    checkpoints = CheckpointFolder(folder / "checkpoints")
    CheckpointFolder.save = lambda self, *a, **k: moments.save(self, *a, **k)  # type: ignore[method-assign]
    sys.setprofile(moments)
    try:
        return tiny_train(
            checkpoints=checkpoints, resume=checkpoints.newest(), eval_examples=tiny_rows(5, seed=9), **SETTINGS
        )
    finally:
        sys.setprofile(None)


def in_child(folder: Path, *, kill_at: int | None = None, in_save: bool = False) -> dict[str, Any] | None:
    """What a forked attempt came to; None if it was killed."""
    answer = folder / "answer.json"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            moments = Moments(kill_at=kill_at, in_save=in_save)
            result = attempt(folder, moments)
            counts = {"all": moments.all, "saving": moments.saving, "resumed_from": result.resumed_from}
            answer.write_text(json.dumps({**counts, **fingerprint(result)}))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise SystemExit(f"an attempt failed with status {status}")
    return json.loads(answer.read_text())


def main(folder: Path, wanted: int) -> None:
    torch.set_num_threads(1)
    tiny_train(steps=1)  # what torch imports only when it is needed, every child would have to
    source = random.Random(0)
    whole = folder / "whole"
    whole.mkdir()
    expected = in_child(whole)
    assert expected is not None
    kills = {"all": 0, "saving": 0}
    runs = resumed = 0
    leftovers: set[str] = set()
    different: list[Any] = []
    while sum(kills.values()) < wanted:
        place = folder / "killed"
        place.mkdir()
        runs += 1
        done = None
        while done is None:
            kind = "saving" if sum(kills.values()) % 2 else "all"
            kill_at = source.randint(1, expected[kind]) if sum(kills.values()) < wanted else None
            done = in_child(place, kill_at=kill_at, in_save=kind == "saving")
            if done is None:
                kills[kind] += 1
                leftovers |= {f"{runs}/{path.name}" for path in place.glob("checkpoints/.*")}
        resumed += done["resumed_from"] is not None
        different += [[runs, key] for key in fingerprint_keys(expected) if done[key] != expected[key]]
        shutil.rmtree(place)
    print(
        json.dumps(
            {"kills": kills, "runs": runs, "leftovers": len(leftovers), "resumed": resumed, "different": different}
        )
    )


def fingerprint_keys(record: dict[str, Any]) -> list[str]:
    return [key for key in record if key not in ("all", "saving", "resumed_from")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
