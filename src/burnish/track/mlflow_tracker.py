"""Mirroring a run to MLflow: everything goes to a spool beside the run, and from there a process of its own sends it.

The run's process writes lines to a local file and knows nothing of the network: MLflow's package, its memory, its waits
and its failures are the sender's (`sender.py`), which has the lowest priority while the run lasts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from burnish.errors import MissingExtraError
from burnish.track.destination import Destination, without_password
from burnish.track.protocol import Status, Tracker
from burnish.track.spool import (
    EVENTS_NAME,
    SUFFIX,
    SpoolState,
    SpoolWriter,
    first_event,
    read_events,
    read_state,
)
from burnish.track.system import SystemReader

_SYNC_S = 10.0
_END_S = 15.0  # a disk or a driver that hangs is left behind
_SLOW_SHARE, _FAILING_SHARE = 1 / 2, 1 / 6
_FAILING_AFTER = 3
_VERSION = 1
_OTHER = re.compile(r"[^\w.-]+", re.ASCII)


class MlflowTracker:
    """One run and the runs within it.

    Args:
        destination: where it is mirrored to.
        beside: what the run writes; the spool is beside it, in `NAME.track/`. None takes the folder of runs
            (BURNISH_RUNS, else `runs`).
        warn: takes lines for people: that the server does not answer, what could not be sent.
        say: takes the line that tells where the run is.

    Raises:
        MissingExtraError: MLflow is not installed.
    """

    def __init__(
        self,
        destination: Destination,
        *,
        beside: Path | None,
        warn: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise MissingExtraError("mlflow is not installed", remedy="Install it with: pip install 'burnish[track]'")
        if destination.driver and importlib.util.find_spec(destination.driver) is None:
            remedy = "Install it with: pip install 'burnish[track]'"
            raise MissingExtraError(f"{destination.driver} is not installed", remedy=remedy)
        self.destination = destination
        self.spool: Path | None = None
        self._beside, self._warn, self._say = beside, warn, say
        self._runs: dict[str, _Run] = {}
        self._root: _Run | None = None
        self._writer: SpoolWriter | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        self._watch: _Watch | None = None

    def start(self, run: str, *, resumed: bool = False) -> None:
        """Open the spool and start the sender. A resumed run goes on as the same run, where its spool is still there.

        Steps that it takes again are not sent again: the first figures stay.
        """
        found = self._unfinished(run) if resumed else None
        self.spool = found or self._fresh_folder(run)
        self._writer = SpoolWriter(self.spool)
        secret = self.destination.uri != self.destination.shown
        first = {"key": secrets.token_hex(16), "version": _VERSION, "destination": self.destination.stored}
        self._writer.open(None if found else {**first, "password": secret})
        self._root = _Run(self._writer, "run", parent=None)
        if found is not None:
            self._root.remember(found)
        self._root.begin(self.destination.run or run, resumed=found is not None, experiment=self.destination)
        self._start_sender()
        self._watch = _Watch(self._writer, self.destination, self.spool, after=self._root.last_reading)
        self._watch.start()

    def params(self, params: Mapping[str, Any]) -> None:
        """As `_Run.params`."""
        self._whole.params(params)

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """As `_Run.metrics`; says once where the server does not answer."""
        self._whole.metrics(metrics, step=step)
        if self._watch is not None and (news := self._watch.news()):
            self._warn(f"tracking: {news}; the run goes on, and what it has to say waits in {self.spool}")

    def artifact(self, path: Path) -> None:
        """As `_Run.artifact`."""
        self._whole.artifact(path)

    def text(self, name: str, text: str) -> None:
        """As `_Run.text`."""
        self._whole.text(name, text)

    def model(self, folder: Path, *, name: str) -> None:
        """Log and register the model."""
        self._whole.model(folder, name=name)

    def child(self, name: str) -> Tracker:
        """A run within the run."""
        return self._whole.child(name)

    def finish(self, status: Status) -> None:
        """Wait a little for what is still to be sent; say where it waits if it was not."""
        if self._root is None or self._writer is None or self.spool is None:
            return
        root, writer = self._root, self._writer
        self._root = self._writer = None
        if self._watch is not None:
            self._watch.end()
        root.finish(status)
        writer.sync()
        writer.close()
        self._end_sender()
        self._tell_outcome()

    @property
    def _whole(self) -> _Run:
        if self._root is None:
            raise RuntimeError("the tracker has no run")
        return self._root

    def _place(self, run: str) -> Path:
        if self._beside is None:
            return Path(os.environ.get("BURNISH_RUNS") or "runs") / f"{run}{SUFFIX}"
        beside = Path(os.path.abspath(self._beside))
        return beside.with_name(f"{beside.name}{SUFFIX}")

    def _fresh_folder(self, run: str) -> Path:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        return self._place(run) / f"{stamp}-{secrets.token_hex(3)}"

    def _unfinished(self, run: str) -> Path | None:
        """The newest spool beside the run, if it is of a run that did not end well and goes to the same place."""
        place = self._place(run)
        found = sorted(place.glob(f"*/{EVENTS_NAME}")) if place.is_dir() else []
        if not found:
            return None
        spool = found[-1].parent
        if first_event(spool).get("destination") != self.destination.stored:
            return None
        ends = [event.get("status") for event in _all_events(spool) if event["event"] == "finish"]
        return None if "finished" in ends else spool

    def _start_sender(self) -> None:
        assert self.spool is not None
        log = (self.spool / "sender.log").open("ab")
        try:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "burnish.track.sender", str(self.spool)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run
            )
            assert self._sender.stdin is not None
            line = json.dumps({"uri": self.destination.uri, "destination": self.destination.stored})
            self._sender.stdin.write(line.encode() + b"\n")
            self._sender.stdin.flush()
        finally:
            log.close()

    def _end_sender(self) -> None:
        sender, spool = self._sender, self.spool
        if sender is None or spool is None:
            return
        state = read_state(spool, self.destination.name)
        wait_s = self.destination.wait_s
        if wait_s:
            with contextlib.suppress(OSError):  # only root may raise it again
                os.setpriority(os.PRIO_PROCESS, sender.pid, 0)
        assert sender.stdin is not None
        with contextlib.suppress(OSError):
            sender.stdin.write(b"finish\n")
            sender.stdin.flush()
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the waiting; the run itself is done
            self._wait(sender, spool, state, wait_s)
        # It may be killed at any moment: what it has not recorded as sent is compared and sent by a replay.
        sender.kill()
        sender.wait()
        with contextlib.suppress(OSError):
            sender.stdin.close()

    def _wait(self, sender: subprocess.Popen[bytes], spool: Path, state: SpoolState, wait_s: float) -> None:
        """Give the sender its time, as long as something moves."""
        now_s = time.monotonic()
        until_s, moved_s = now_s + wait_s, now_s
        while sender.poll() is None and now_s < until_s:
            # A server that does not answer is not waited for as long as one that is only slow.
            if now_s - moved_s > wait_s * (_FAILING_SHARE if state.failures else _SLOW_SHARE):
                break
            time.sleep(0.2)
            now_s = time.monotonic()
            before, state = state, read_state(spool, self.destination.name)
            if state != before or state.uploading:
                moved_s = now_s

    def _tell_outcome(self) -> None:
        assert self.spool is not None
        state = read_state(self.spool, self.destination.name)
        left = (self.spool / EVENTS_NAME).stat().st_size - state.offset
        if left:
            waiting = sum(1 for _ in read_events(self.spool, state.offset, most=left))
            why = f" ({state.error})" if state.error else ""
            self._warn(
                f"tracking: {waiting} entries are still to be sent to {self.destination.shown}{why}; "
                f"send them with: burnish track replay {self.spool}"
            )
        for line in state.refused[:3]:
            self._warn(f"tracking: {self.destination.shown} refused {line}")
        run_id = state.runs.get("run")
        if run_id and state.experiment_id:
            self._say(f"tracked: {self._to_be_seen(state.experiment_id, run_id)}")

    def _to_be_seen(self, experiment_id: str, run_id: str) -> str:
        """The page of a server; of a database the run, and how to look at it."""
        place = self.destination
        if url := place.url_of(experiment_id, run_id):
            return url
        command = f"mlflow server --backend-store-uri {shlex.quote(place.shown)}"
        return f"run {run_id} of experiment {place.experiment} in {place.shown}; look at it with: {command}"


class _Run:
    """One run in the spool: the whole, or a part of it."""

    def __init__(self, writer: SpoolWriter, path: str, *, parent: str | None) -> None:
        self._writer, self._path, self._parent = writer, path, parent
        self._seen: set[tuple[str, int]] = set()
        self._register: Destination | None = None

    def remember(self, spool: Path) -> None:
        """The steps that an earlier process has told of are not told again."""
        for event in _all_events(spool):
            if event["event"] == "metrics" and event["run"] == self._path and event.get("step") is not None:
                self._seen.update((name, event["step"]) for name in event["metrics"])

    @property
    def last_reading(self) -> int:
        """The number of the last reading of the machine that is remembered."""
        return max((step for name, step in self._seen if name.startswith("system/")), default=0)

    def begin(self, name: str, *, resumed: bool, experiment: Destination | None) -> None:
        if experiment is not None:
            self._register = experiment
        event = "resume" if resumed else "start"
        self._writer.write(event, self._path, name=name, parent=self._parent, command=_command())

    def start(self, run: str, *, resumed: bool = False) -> None:
        """A part begins; its name was given when it was made."""
        self.begin(self._path.rpartition("/")[2], resumed=False, experiment=None)

    def params(self, params: Mapping[str, Any]) -> None:
        self._writer.write("params", self._path, params=dict(params))

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        if step is not None and self._seen:
            metrics = {name: value for name, value in metrics.items() if (name, step) not in self._seen}
        if metrics:
            self._writer.write("metrics", self._path, step=step, metrics=dict(metrics))

    def artifact(self, path: Path) -> None:
        kept = self._writer.keep(Path(path))
        self._writer.write("artifact", self._path, path=str(path), kept=kept)

    def text(self, name: str, text: str) -> None:
        kept = self._writer.keep_text(name, text)
        self._writer.write("artifact", self._path, path=name, kept=kept)

    def model(self, folder: Path, *, name: str) -> None:
        chosen = self._register
        if chosen is not None and chosen.model == "none":
            return
        registered = None
        if chosen is not None:
            registered = chosen.model or f"{chosen.experiment}-{name}"
            if chosen.model and self._parent is not None:
                registered = f"{chosen.model}-{name}"
            registered = _OTHER.sub("-", registered)
        kept = self._writer.keep(Path(folder))
        called = _OTHER.sub("-", name)
        self._writer.write("model", self._path, path=str(folder), kept=kept, name=called, registered=registered)

    def child(self, name: str) -> Tracker:
        made = _Run(self._writer, f"{self._path}/{name}", parent=self._path)
        made._register = self._register
        return made

    def finish(self, status: Status) -> None:
        self._writer.write("finish", self._path, status=status)


class _Watch(threading.Thread):
    """Reads the machine at an interval, has the disk hold the spool, and notices a server that does not answer."""

    def __init__(self, writer: SpoolWriter, destination: Destination, spool: Path, *, after: int) -> None:
        super().__init__(name="burnish-track", daemon=True)
        self._writer, self._destination, self._spool = writer, destination, spool
        self._after = after
        self._over = threading.Event()
        self._news: str | None = None
        self._told = False

    def news(self) -> str | None:
        """What people should know; once."""
        news, self._news = self._news, None
        return news

    def end(self) -> None:
        self._over.set()
        self.join(_END_S)

    def run(self) -> None:
        """Until the end. A full disk, or a driver that fails, ends the readings and nothing else."""
        try:
            self._read()
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            self._news = f"the machine is read no longer ({said})"

    def _read(self) -> None:
        reader = SystemReader() if self._destination.system_s else None
        read_s = synced_s = time.monotonic()
        number = self._after
        while not self._over.wait(0.5):
            now_s = time.monotonic()
            if reader is not None and now_s - read_s >= self._destination.system_s:
                read_s = now_s
                number += 1
                self._writer.write("metrics", "run", step=number, metrics=reader.read())
            if now_s - synced_s >= _SYNC_S:
                synced_s = now_s
                self._writer.sync()
                state = read_state(self._spool, self._destination.name)
                if state.failures >= _FAILING_AFTER and not self._told:
                    self._told = True
                    self._news = f"{self._destination.shown} does not take it ({state.error})"
        if reader is not None:
            if number == self._after:
                self._writer.write("metrics", "run", step=number + 1, metrics=reader.read())
            reader.close()


def _all_events(spool: Path) -> list[dict[str, Any]]:
    size = (spool / EVENTS_NAME).stat().st_size
    return [event for event, _ in read_events(spool, 0, most=size)]


def _command() -> str:
    if not sys.argv[0].endswith(("burnish", "__main__.py")):
        return "python"
    return " ".join(["burnish", *map(without_password, sys.argv[1:])])
