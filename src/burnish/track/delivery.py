"""From a spool to MLflow, with nothing missing and nothing twice, however often it is begun again.

A run has a key, made with its spool, which it carries as a tag: whoever begins again looks for the key before making a
run. A figure is known by its name, step and time, all three of them the spool's, so what is sent again is the same
figure. After a failure, and always in a replay, what is to be sent is compared with what is there.
"""

from __future__ import annotations

import functools
import getpass
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from burnish.track.destination import Destination
from burnish.track.mlflow_api import Mlflow, in_words, is_gone, is_refusal
from burnish.track.registering import deliver_model
from burnish.track.spool import (
    EVENTS_NAME,
    first_event,
    hold,
    read_events,
    read_state,
    write_state,
)

KEY_TAG = "burnish.key"
_MOST_METRICS = 500
_MOST_PARAMS = 100
_MOST_CHARS = 6000
_MOST_REFUSED = 100
_LARGEST = 1.7976931348623157e308  # what MLflow's databases hold for an infinity
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_OTHER = re.compile(r"[^\w\-. :/]", re.ASCII)


class Delivery:
    """Sends a spool to a destination.

    Args:
        spool: its folder.
        compare: begin at the spool's start, and compare everything with what the destination has. Else go on where it
            was left, and compare only what may have been on its way then.
        open_client: gives MLflow's client; raises while it cannot be reached.

    Attributes:
        num_sent: facts that were sent: figures, settings, files, models, ends.
        num_there: facts that were there already.
        missing: files that are gone from here.
    """

    def __init__(
        self,
        spool: Path,
        destination: Destination,
        *,
        compare: bool,
        open_client: Callable[[Destination], Mlflow] = Mlflow,
    ) -> None:
        self.spool, self.destination = spool, destination
        self.num_sent = self.num_there = 0
        self.missing: list[str] = []
        self.state = read_state(spool, destination.name)
        self.state.destination = destination.shown
        self._open_client = open_client
        self._client: Mlflow | None = None
        self._replays = compare
        self._compares = True
        self._offset = 0 if compare else self.state.offset
        if compare:
            self.state.refused = []
        self._key = str(first_event(spool).get("key", ""))
        self._known: dict[tuple[str, str], set[tuple[int, int]]] = {}
        self._params: dict[str, dict[str, str]] = {}

    @property
    def is_whole(self) -> bool:
        """Everything in the spool is sent."""
        return self._offset >= (self.spool / EVENTS_NAME).stat().st_size

    def advance(self) -> bool:
        """Send what there is, a few MiB of it at most; whether anything was.

        Raises:
            Exception: whatever MLflow raised; what was confirmed until then is on record, and the next call goes on.
        """
        try:
            moved = self._advance()
        except Exception as error:
            self._compares = True
            self._known.clear()
            self._params.clear()
            if is_gone(error) and self.state.runs:
                # The server has lost what it had: everything is sent once more.
                self.state.runs, self.state.experiment_id, self.state.offset = {}, None, 0
                self._offset, self._replays = 0, True
            self.state.failures += 1
            self.state.error = in_words(error)
            self._client = None
            self._save()
            raise
        if moved and not self._replays:
            self._compares = False
            self._known.clear()
            self._params.clear()
        if moved or self.state.failures:
            self.state.failures, self.state.error = 0, None
            self._save()
        return moved

    def end_abandoned(self) -> None:
        """Say of runs that have no end, of a process that is gone, that they failed."""
        held = hold(self.spool / "writer.lock")
        if held is None:
            return
        held.close()
        last_ms, is_open = 0, dict.fromkeys(self.state.runs, False)
        for event, _ in read_events(self.spool, 0, most=1 << 62):
            last_ms = _milliseconds(event)
            if event["event"] in ("start", "resume", "finish"):
                is_open[event["run"]] = event["event"] != "finish"
        for run, run_id in self.state.runs.items():
            if is_open.get(run):
                self._mlflow.end_run(run_id, "FAILED", last_ms)

    @property
    def _mlflow(self) -> Mlflow:
        if self._client is None:
            self._client = self._open_client(self.destination)
        return self._client

    def _advance(self) -> bool:
        batch: dict[str, _Batch] = {}
        begin = end = self._offset
        for event, after in read_events(self.spool, self._offset):
            if event["event"] in ("params", "metrics"):
                batch.setdefault(event["run"], _Batch()).add(event)
                end = after
                if sum(len(one.metrics) for one in batch.values()) >= _MOST_METRICS:
                    self._send(batch, end)
                    batch = {}
            else:
                self._send(batch, end)
                batch = {}
                self._handle(event)
                end = after
                self._confirm(end)
        self._send(batch, end)
        return end != begin

    def _confirm(self, offset: int) -> None:
        self._offset = offset
        self.state.offset = max(self.state.offset, offset)
        self._save()

    def _save(self) -> None:
        write_state(self.spool, self.destination.name, self.state)

    def _handle(self, event: Mapping[str, Any]) -> None:
        kind, run = event["event"], event["run"]
        if kind in ("start", "resume"):
            self._start(event)
            if kind == "resume":
                self._mlflow.reopen_run(self.state.runs[run])
        elif kind == "finish":
            status, end_ms = _STATUS[event["status"]], _milliseconds(event)
            if self._compares and self._mlflow.has_ended(self.state.runs[run], status, end_ms):
                self.num_there += 1
            else:
                self._mlflow.end_run(self.state.runs[run], status, end_ms)
                self.num_sent += 1
        elif kind in ("artifact", "model"):
            self.state.uploading = True
            self._save()
            try:
                self._refusable(f"{kind} {event['path']}", lambda: self._upload(event))
            finally:
                self.state.uploading = False

    def _start(self, event: Mapping[str, Any]) -> None:
        """Find the run by its key, or make it. One that two requests made is kept once."""
        if self.state.experiment_id is None:
            self.state.experiment_id = self._mlflow.experiment(self.destination)
        experiment = self.state.experiment_id
        key = f"{self._key}/{event['run']}"
        found = self._mlflow.runs_with(experiment, KEY_TAG, key)
        is_new = not found
        if is_new:
            command = str(event.get("command", ""))
            source = " ".join(command.split()[:2])  # the page shows what follows the last slash of it
            tags = {KEY_TAG: key, "mlflow.source.name": source, "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
            tags["burnish.command"] = command[:_MOST_CHARS]
            if event.get("parent"):
                tags["mlflow.parentRunId"] = self.state.runs[event["parent"]]
            made = self._mlflow.create_run(experiment, event["name"], tags, _milliseconds(event))
            found = self._mlflow.runs_with(experiment, KEY_TAG, key) or [made]
        for twice in found[1:]:
            self._mlflow.delete_run(twice)
        self.state.runs[event["run"]] = found[0]
        self.num_sent += is_new
        self.num_there += not is_new

    def _send(self, batches: Mapping[str, _Batch], end: int) -> None:
        for run, batch in batches.items():
            run_id = self.state.runs[run]
            metrics = [fact for fact in batch.metrics if not self._is_there(run_id, fact)]
            params, tags = self._new_params(run_id, batch.params)
            self.num_there += len(batch.metrics) - len(metrics)
            for start in range(0, len(metrics), _MOST_METRICS):
                self._log(run_id, metrics=metrics[start : start + _MOST_METRICS])
            for names in _chunks(params, _MOST_PARAMS):
                self._log(run_id, params=names)
            for names in _chunks(tags, _MOST_PARAMS):
                self._log(run_id, tags=names)
            self.num_sent += len(metrics) + len(params) + len(tags)
        if batches:
            self._confirm(end)

    def _log(self, run_id: str, **facts: Any) -> None:
        """Send a batch; where it is refused, each fact by itself, so that the others arrive."""
        try:
            self._mlflow.log(run_id, **facts)
            return
        except Exception as error:
            if not is_refusal(error):
                raise
            if self._mlflow.is_deleted(run_id):
                self._refuse(f"run {run_id}", "it was deleted there")
                return
        for kind, values in facts.items():
            singles = (
                [dict([pair]) for pair in values.items()] if isinstance(values, dict) else [[one] for one in values]
            )
            for single in singles:
                name = next(iter(single)) if isinstance(single, dict) else single[0][0]
                only: dict[str, Any] = {kind: single}
                self._refusable(f"{kind} {name}", functools.partial(self._mlflow.log, run_id, **only))

    def _refusable(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not is_refusal(error):
                raise
            self._refuse(what, str(error))

    def _refuse(self, what: str, why: str) -> None:
        line = f"{what}: {' '.join(why.split())[:200]}"
        if line not in self.state.refused and len(self.state.refused) < _MOST_REFUSED:
            self.state.refused.append(line)

    def _is_there(self, run_id: str, fact: tuple[str, float, int, int]) -> bool:
        if not self._compares:
            return False
        name, _, timestamp, step = fact
        key = (run_id, name)
        if key not in self._known:
            self._known[key] = self._mlflow.metric_places(run_id, name)
        if (step, timestamp) in self._known[key]:
            return True
        self._known[key].add((step, timestamp))
        return False

    def _new_params(self, run_id: str, params: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Params that are not there; and, as tags, those that are there with another value, which stays."""
        if not params:
            return {}, {}
        if run_id not in self._params:
            self._params[run_id] = self._mlflow.params(run_id)
        there = self._params[run_id]
        new = {name: value for name, value in params.items() if name not in there}
        changed = {f"later.{name}": value for name, value in params.items() if there.get(name, value) != value}
        self.num_there += len(params) - len(new) - len(changed)
        there.update(new)
        return new, changed

    def _upload(self, event: Mapping[str, Any]) -> None:
        """Upload a file or a model, as it was kept or from where the run wrote it; what is there may be gone here."""
        kept = self.spool / event["kept"]
        source = next((place for place in (kept, Path(event["path"])) if place.exists()), None)
        run_id, experiment_id = self.state.runs[event["run"]], self.state.experiment_id
        assert experiment_id is not None
        if event["event"] == "model":
            key = f"{self._key}/{event['run']}/{event['name']}"
            outcome = deliver_model(self._mlflow, event, source, key, run_id, experiment_id)
        elif (self._compares or source is None) and self._mlflow.has_artifact(run_id, kept.name, source):
            outcome = "there"
        elif source is None:
            outcome = "missing"
        else:
            self._mlflow.upload(run_id, source)
            outcome = "sent"
        self.num_sent += outcome == "sent"
        self.num_there += outcome == "there"
        if outcome == "missing":
            self.missing.append(event["path"])
        if event["event"] == "model" and kept.exists():
            shutil.rmtree(kept.parent, ignore_errors=True)  # links hold the disk's space when the run's own files go


class _Batch:
    """Facts of one run that go together."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int, int]] = []
        self.params: dict[str, str] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "params":
            self.params |= {clean(name): _text(value) for name, value in event["params"].items()}
            return
        step = 0 if event.get("step") is None else int(event["step"])
        for name, value in event["metrics"].items():
            self.metrics.append((clean(name), _number(value), _milliseconds(event), step))


def clean(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return _OTHER.sub("_", name)[:250]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."


def _number(value: Any) -> float:
    number = float(value)  # "NaN" and "Infinity" as well
    return math.copysign(_LARGEST, number) if math.isinf(number) else number


def _milliseconds(event: Mapping[str, Any]) -> int:
    return round(float(event["time"]) * 1000)


def _chunks(values: dict[str, str], size: int) -> Iterable[dict[str, str]]:
    items = list(values.items())
    for start in range(0, len(items), size):
        yield dict(items[start : start + size])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
