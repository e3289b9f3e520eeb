"""Folders `checkpoint-000123` of a run under way: each is there whole or not at all, and damage is noticed.

    state.json             settings, base and data that the run belongs to; counters; the structure of the optimizer
    tensors.safetensors    trained parameters, optimizer, random states
    steps.jsonl            the steps until now
    evals.jsonl            the evaluations until now
    checksums.json         bytes and SHA-256 of the others

A folder is written under a temporary name, every file and the folder itself flushed to disk, then renamed, and the
rename is flushed. Removing goes the other way round. So whatever moment the power goes, a folder under its final name
is whole unless the disk broke it. What is in the files is decided in `state.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import CapacityError, CheckpointError
from burnish.models.atomic_files import write_text, writing_to
from burnish.models.checkpoint import read_header
from burnish.models.checkpoint_writing import pending, write_safetensors
from burnish.train.state import Snapshot

FORMAT = 1
STATE, TENSORS, STEPS, EVALS, SUMS = (
    "state.json", "tensors.safetensors", "steps.jsonl", "evals.jsonl", "checksums.json",
)  # fmt: skip
_NAME = re.compile(r"checkpoint-(\d{6,})")
_LEFTOVER = re.compile(r"\.checkpoint-\d{6,}\.\d+\.(new|old)")
_BLOCK = 1 << 20


class Checkpoint:
    """A checkpoint folder that was found whole.

    Args:
        path: the folder.

    Raises:
        CheckpointError: it is not there, it is damaged, or another version wrote it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        _check_sums(self.path)
        record = _read_json(self.path / STATE)
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path} was written by another version", got=f"format {record.get('format')}", expected=FORMAT
            )
        self.step: int = record["step"]
        self.identity: dict[str, Any] = record["identity"]
        self.environment: dict[str, Any] = record["environment"]
        self.values: dict[str, Any] = record["values"]
        self._tensors = {info.name: info for info in read_header(self.path / TENSORS)}

    @property
    def steps(self) -> list[Any]:
        """Step records as plain JSON, see `state.from_json`."""
        return _read_lines(self.path / STEPS)

    @property
    def evals(self) -> list[Any]:
        """Evaluation records as plain JSON."""
        return _read_lines(self.path / EVALS)

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own: a mapped file would count as the run's for as long as it lasts.

        Raises:
            CheckpointError: there is none of that name, or it cannot be read any more.
        """
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path / TENSORS} has no tensor {name}")
        tensor = torch.empty(info.shape, dtype=info.dtype)
        bytes_of_it = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with info.path.open("rb") as file:
                file.seek(info.start)
                whole = file.readinto(bytes_of_it) == info.num_bytes
        except OSError as error:
            raise CheckpointError(f"{info.path} cannot be read: {error.strerror or error}") from error
        if not whole:
            raise CheckpointError(f"{info.path} ends inside {name}")
        return tensor


class CheckpointFolder:
    """The checkpoints of one run, oldest first, and what of them is kept.

    Args:
        path: the folder above them; made with the first checkpoint.
        identity: plain JSON on which the run's outcome depends (settings, base, data); a run of another identity does
            not go on from here.
        environment: plain JSON that may differ when a run goes on, at the price of other last bits (threads, versions).
        save_at_end: also write one when the run comes to its end by itself.
        notify: told what people should know: a full disk, a damaged checkpoint.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        identity: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        save_at_end: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.identity, self.environment = dict(identity or {}), dict(environment or {})
        self.save_at_end = save_at_end
        self.notify = notify or (lambda text: None)
        self._complained = False

    def place(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is or would be."""
        return self.path / f"checkpoint-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, whole or damaged, oldest first."""
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, self._entries()) if match)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; every damaged one before it is reported."""
        for step in reversed(self.steps()):
            found = self._whole(step)
            if found is not None:
                return found
        return None

    def save(self, snapshot: Snapshot, *, keep_last: int | None, keep_step: int | None = None) -> bool:
        """Write a checkpoint, then remove older ones.

        A disk that is full, or a folder that cannot be written to, is reported once and leaves the older checkpoints as
        they are; so does a snapshot whose parameters are not finite.

        Args:
            snapshot: of `state.capture`.
            keep_last: how many are kept; None removes nothing.
            keep_step: kept besides those.

        Returns:
            Whether it is on the disk now.
        """
        if not snapshot.parameters_are_finite:
            self._complain(f"no checkpoint after step {snapshot.step}: trained weights are not finite")
            return False
        try:
            self._write(snapshot)
        except (CapacityError, CheckpointError) as error:
            older = self.steps()
            kept = f"the one of step {older[-1]} stays" if older else "there is none yet"
            self._complain(f"no checkpoint after step {snapshot.step}, {kept}, training goes on: {error.message}")
            return False
        self._complained = False
        if keep_last is not None:
            last = self.steps()[-keep_last:]
            self.discard(lambda step: step not in last and step != keep_step)
        return True

    def discard(self, condition: Callable[[int], bool]) -> None:
        """Remove the checkpoints after such steps; none is ever half there under its name."""
        for step in filter(condition, self.steps()):
            with contextlib.suppress(OSError):
                doomed = self._aside(step, "old")
                os.rename(self.place(step), doomed)
                shutil.rmtree(doomed)

    def clear_leftovers(self) -> None:
        """Remove what a process that was killed while it wrote or removed a checkpoint left behind."""
        for name in filter(_LEFTOVER.fullmatch, self._entries()):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self._remove_if_empty()

    def clear(self) -> None:
        """Remove every checkpoint, and the folder if nothing else is in it."""
        self.discard(lambda step: True)
        self.clear_leftovers()

    def is_ours(self) -> bool:
        """The folder is there and nothing but checkpoints and their leftovers is in it."""
        return self.path.is_dir() and all(_NAME.fullmatch(x) or _LEFTOVER.fullmatch(x) for x in self._entries())

    def _whole(self, step: int) -> Checkpoint | None:
        try:
            return Checkpoint(self.place(step))
        except CheckpointError as error:
            self.notify(f"{error.message}; looking for an older one")
            return None

    def _write(self, snapshot: Snapshot) -> None:
        final, fresh, old = (
            self.place(snapshot.step),
            self._aside(snapshot.step, "new"),
            self._aside(snapshot.step, "old"),
        )
        record = {
            "format": FORMAT,
            "step": snapshot.step,
            "identity": self.identity,
            "environment": self.environment,
            "values": snapshot.values,
        }
        try:
            with writing_to(final):
                missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
                fresh.mkdir(parents=True, exist_ok=True)
                for folder in missing:
                    _flush_folder(folder.parent)
            write_safetensors(fresh / TENSORS, {name: pending(tensor) for name, tensor in snapshot.tensors.items()})
            write_text(fresh / STEPS, _lines(snapshot.steps))
            write_text(fresh / EVALS, _lines(snapshot.evals))
            write_text(fresh / STATE, json.dumps(record, indent=1) + "\n")
            with writing_to(final):
                sums = {name: _sum(fresh / name) for name in (STATE, TENSORS, STEPS, EVALS)}
            write_text(fresh / SUMS, json.dumps(sums, indent=1) + "\n")
            with writing_to(final):
                _flush_folder(fresh)
                if final.exists():  # a damaged one: the run has come by here before
                    os.rename(final, old)
                os.rename(fresh, final)
                _flush_folder(self.path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            self._remove_if_empty()
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def _aside(self, step: int, kind: str) -> Path:
        return self.path / f".{self.place(step).name}.{os.getpid()}.{kind}"

    def _entries(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _complain(self, text: str) -> None:
        if not self._complained:
            self.notify(text)
        self._complained = True


def find_checkpoint(path: Path | str, *, notify: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The checkpoint that a path names: itself, or the newest whole one in it or in its folder `checkpoints`.

    Raises:
        CheckpointError: the path names one checkpoint, and it is damaged.
    """
    path = Path(path)
    if _NAME.fullmatch(path.name) or (path / SUMS).exists():
        return Checkpoint(path)
    for folder in (path, path / "checkpoints"):
        found = CheckpointFolder(folder, notify=notify).newest()
        if found is not None:
            return found
    return None


def first_difference(saved: Any, now: Any, *, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first thing in which two plain JSON values differ; None when they are equal."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in saved if key not in now)]:
            found = first_difference(saved.get(key), now.get(key), name=f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    return None if saved == now else (name, saved, now)


def _check_sums(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    sums = _read_json(folder / SUMS)
    if set(sums) != {STATE, TENSORS, STEPS, EVALS}:
        raise CheckpointError(f"{folder} is damaged: {SUMS} names other files")
    for name, expected in sums.items():
        try:
            found = _sum(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged: {name}: {error.strerror or error}") from error
        if found != expected:
            raise CheckpointError(f"{folder} is damaged: {name} is not what was written")


def _sum(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.parent} is damaged: {path.name}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.parent} is damaged: {path.name} is not JSON") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path.parent} is damaged: {path.name} is not a JSON object")
    return record


def _read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _flush_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
