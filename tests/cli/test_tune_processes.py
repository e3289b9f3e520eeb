"""`tune` in several processes: what is written and said once, with the losses of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def tune(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "burnish", "tune", "burnish-sql-base", "--out", str(out), "--offline", "--json"),
        *("--data", "text-to-sql:train:24", "--steps", "4", "--micro-batch-size", "4", "--max-length", "192"),
        *("--precision", "float32", *options),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("sharding", ["none", "zero3"])
def test_two_processes_write_one_result_with_the_losses_of_one(tmp_path: Path, sharding: str) -> None:
    def record(name: str, *options: str) -> dict[str, Any]:
        done = tune(tmp_path / name, "--quiet", "--threads", "1", *options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    one = record("one")
    two = record("two", "--processes", "2", "--sharding", sharding)
    losses = [[step["loss"] for step in run["steps"]] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_error_of_two_processes_is_one_line(tmp_path: Path) -> None:
    done = tune(tmp_path / "x", "--processes", "2", "--optimizer", "adamw-8bit")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: optimizer adamw-8bit runs on CUDA devices only")
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "x" / "adapter_model.safetensors").exists()
