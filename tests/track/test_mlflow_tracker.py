"""What a run tells MLflow: spooled beside it at once, whoever answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from burnish.errors import BurnishError, ConfigError
from burnish.track.jsonl import read_runs
from burnish.track.making import make_tracker
from burnish.track.replay import replay
from burnish.track.spool import EVENTS_NAME, find_spools, first_event
from burnish.track.system import SystemReader

pytest.importorskip("mlflow", reason="the extra track brings it")


@pytest.fixture
def nowhere() -> str:
    """A URI at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}?wait=0&system=0"


def test_run_and_its_parts_are_in_the_spool(nowhere: str, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    tracker = make_tracker(nowhere, beside=out, warn=said.append)
    tracker.start("demo")
    part = tracker.child("tune")
    part.start("adapter")
    part.params({"rank": 4})
    part.metrics({"loss": 1.0}, step=1)
    (tmp_path / "file.json").write_text("old")
    part.artifact(tmp_path / "file.json")
    (tmp_path / "file.json").unlink()
    part.text("note.txt", "text")
    part.finish("finished")
    tracker.finish("interrupted")
    (spool,) = find_spools(out)
    whole, tune = (run for run in read_runs(spool / EVENTS_NAME) if run.name)
    assert (whole.name, whole.status) == ("run", "interrupted")
    assert (tune.name, tune.status, tune.params) == ("run/tune", "finished", {"rank": 4})
    assert tune.series("loss") == [(1, 1.0)]
    kept = sorted(file.name for file in (spool / "files").rglob("*") if file.is_file())
    assert kept == ["file.json", "note.txt"]
    (line,) = said
    assert f"burnish track replay {spool}" in line
    assert not out.exists(), "nothing of the spool is in the run's own folder"
    with pytest.raises(BurnishError, match="does not take"):
        replay(out)


def test_password_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    uri = "mysql://someone:hidden@127.0.0.1:1/db?wait=0&system=0"
    tracker = make_tracker(uri, beside=tmp_path / "out", warn=lambda line: None)
    tracker.start("run")
    tracker.finish("finished")
    (spool,) = find_spools(tmp_path / "out")
    assert first_event(spool)["password"] is True
    for file in spool.rglob("*"):
        assert not file.is_file() or b"hidden" not in file.read_bytes()
    with pytest.raises(ConfigError, match="password"):
        replay(tmp_path / "out")


def test_resumed_run_goes_on_as_the_same_run_without_the_steps_it_takes_again(nowhere: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number, (steps, status) in enumerate(((range(1, 6), "interrupted"), (range(4, 9), "finished"))):
        tracker = make_tracker(nowhere, beside=out, warn=lambda line: None)
        tracker.start("out", resumed=bool(number))
        for step in steps:
            tracker.metrics({"loss": 1.0 / step, "seconds": float(number)}, step=step)
        tracker.finish(status)  # type: ignore[arg-type]
    (spool,) = find_spools(out)
    (run,) = (run for run in read_runs(spool / EVENTS_NAME) if run.name)
    assert [step for step, _ in run.series("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [value for _, value in run.series("seconds")] == [0, 0, 0, 0, 0, 1, 1, 1]
    third = make_tracker(nowhere, beside=out, warn=lambda line: None)
    third.start("out", resumed=True)
    third.finish("finished")
    assert len(find_spools(out)) == 2, "a run that ended well is not gone on with"


def test_sender_ends_with_a_run_that_is_killed(nowhere: str, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from burnish.track.making import make_tracker\n"
        "tracker = make_tracker(sys.argv[1], beside='out')\n"
        "tracker.start('run')\n"
        "print(tracker.tracker._sender.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, nowhere], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert run.stdout is not None
    sender = int(run.stdout.readline())
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(sender).wait(240)
    assert not psutil.pid_exists(sender) or psutil.Process(sender).status() == psutil.STATUS_ZOMBIE
    (spool,) = find_spools(tmp_path / "out")
    lines = [json.loads(line) for line in (spool / EVENTS_NAME).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["spool", "start"]


def test_machine_is_read() -> None:
    reader = SystemReader()
    figures = reader.read()
    reader.close()
    assert 0 < figures["system/system_memory_usage_percentage"] <= 100
    assert figures["system/process_memory_megabytes"] > 1
    assert {"system/cpu_utilization_percentage", "system/process_cpu_percentage"} <= figures.keys()


def test_machine_that_cannot_be_read_ends_the_readings_alone(
    nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reader: SystemReader) -> dict[str, float]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SystemReader, "read", fail)
    said: list[str] = []
    tracker = make_tracker(nowhere.replace("system=0", "system=0.01"), beside=tmp_path / "out", warn=said.append)
    tracker.start("run")
    tracker.tracker._watch.join(300)  # type: ignore[attr-defined]
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert "the machine is read no longer" in said[0]
    assert "No space left" in said[0]
    (spool,) = find_spools(tmp_path / "out")
    (run,) = (run for run in read_runs(spool / EVENTS_NAME) if run.name)
    assert (run.series("loss"), run.status) == ([(1, 1.0)], "finished")


def test_nothing_to_replay_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay(tmp_path / "none")


def test_cards_are_read_by_the_drivers_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """Two cards; the second one tells no watts."""

        closed = False

        def nvmlInit_v2(self) -> int:
            return 0

        def nvmlDeviceGetCount_v2(self, count: Any) -> int:
            count._obj.value = 2
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
            handle._obj.value = 100 + index
            return 0

        def nvmlDeviceGetUtilizationRates(self, handle: Any, use: Any) -> int:
            use._obj.gpu = handle.value - 60
            return 0

        def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
            memory._obj.total, memory._obj.used = 8 << 30, 2 << 30
            return 0

        def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
            milliwatts._obj.value = 250_500
            return 0 if handle.value == 100 else 3

        def nvmlShutdown(self) -> int:
            self.closed = True
            return 0

    driver = Driver()
    monkeypatch.setattr("ctypes.CDLL", lambda name: driver)
    reader = SystemReader()
    figures = reader.read()
    reader.close()
    assert driver.closed
    assert figures["system/gpu_0_utilization_percentage"] == 40
    assert figures["system/gpu_1_utilization_percentage"] == 41
    assert figures["system/gpu_0_memory_usage_megabytes"] == 2048
    assert figures["system/gpu_0_memory_usage_percentage"] == 25
    assert figures["system/gpu_0_power_usage_watts"] == 250.5
    assert "system/gpu_1_power_usage_watts" not in figures
