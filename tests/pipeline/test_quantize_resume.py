from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.compress.config import QuantizeConfig
from burnish.errors import ConfigError
from burnish.measure.compare import GateLimits
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.quantize import quantize
from burnish.pipeline.unfinished_quantization import PARTIAL

CONFIG = QuantizeConfig(bits=4, group_size=16, match_parent=True, refine=1)
KILLED = """
import os, signal, sys
import torch
from burnish.compress.config import QuantizeConfig
from burnish.pipeline.quantize import quantize

torch.set_num_threads(1)

def progress(label, done, total, note=""):
    if label.startswith("Quantizing") and done == 9:
        os.kill(os.getpid(), signal.SIGKILL)

config = QuantizeConfig(bits=4, group_size=16, match_parent=True, refine=1)
quantize(sys.argv[1], out=sys.argv[2], config=config, num_samples=8, progress=progress)
"""


@pytest.fixture
def killed(merged: MergeRecord, tmp_path: Path) -> Path:
    """What a run leaves that is killed in its second block."""
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, merged.out, str(out)], check=False, timeout=120, env=dict(os.environ)
    )
    assert result.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    return out


def test_same_command_goes_on_and_writes_the_same_files(merged: MergeRecord, killed: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = quantize(merged.out, out=killed, config=CONFIG, num_samples=8, limits=GateLimits(), notify=said.append)
    whole = quantize(merged.out, out=tmp_path / "whole", config=CONFIG, num_samples=8, limits=GateLimits())
    assert said == [f"going on after 1 of 2 blocks, from {killed / PARTIAL}"]
    names = {path.name for path in killed.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert [(layer.name, layer.error) for layer in found.layers] == [(each.name, each.error) for each in whole.layers]
    assert found.gate == whole.gate
    assert found.disk_bytes == whole.disk_bytes


def test_other_settings_are_refused_and_can_begin_anew(merged: MergeRecord, killed: Path) -> None:
    other = QuantizeConfig(bits=8, group_size=16)
    with pytest.raises(ConfigError, match=r"other settings\.bits: 4 there, 8 here.*--resume never --overwrite"):
        quantize(merged.out, out=killed, config=other, num_samples=8)
    with pytest.raises(ConfigError, match="other calibration"):
        quantize(merged.out, out=killed, config=CONFIG, num_samples=9)
    with pytest.raises(ConfigError, match="is not empty"):
        quantize(merged.out, out=killed, config=other, num_samples=8, resume="never")
    record = quantize(
        merged.out, out=killed, config=other, num_samples=8, resume="never", overwrite=True, limits=GateLimits()
    )
    assert record.bits == 8
    assert not (killed / PARTIAL).exists()


def test_word_that_is_no_way_to_resume_is_refused(merged: MergeRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto or never"):
        quantize(merged.out, out=tmp_path / "q", resume="yes")
