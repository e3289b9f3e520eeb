"""`tune` interrupted and called again: it goes on where it was, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_fakes import read_manifest_of

from burnish.errors import CheckpointError, ConfigError
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.resuming import ResumeConfig, is_unfinished
from burnish.pipeline.tune import TuneRecord, tune
from burnish.train.checkpoints import CheckpointFolder
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import sql_rows, write_json, write_tiny_llama

CONFIG = TrainConfig(steps=6, micro_batch_size=2, learning_rate=5e-3, precision="float32", save_every=2)
LORA = LoraConfig(rank=2, alpha=4, dropout=0.1)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def go(tiny: Path, rows_file: Path, tmp_path: Path, said: list[str]) -> Any:
    """Tune into tmp_path/out; `press_at` presses Ctrl-C after that step."""

    def call(*, press_at: int | None = None, **options: Any) -> TuneRecord:
        pressed: list[int] = []

        def press(label: str, done: int, total: int, note: str = "") -> None:
            if done == press_at and not pressed:
                pressed.append(done)
                os.kill(os.getpid(), signal.SIGINT)

        settings: dict[str, Any] = {
            "model": str(tiny), "data": DataConfig(source=str(rows_file)), "out": tmp_path / "out", "lora": LORA,
            "config": CONFIG, "source": Source(dtype="float32"), "progress": press, "notify": said.append,
        }  # fmt: skip
        return tune(**{**settings, **options})

    return call


def losses(record: TuneRecord) -> list[float]:
    return [step["loss"] for step in record.steps]


def adapter_bytes(folder: Path | str) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_the_same_call_goes_on_and_the_result_is_bit_for_bit_that_of_one_run(
    go: Any, tmp_path: Path, said: list[str]
) -> None:
    whole = go(out=tmp_path / "whole")
    assert not (tmp_path / "whole" / "checkpoints").exists()
    first = go(press_at=3)
    assert first.interrupted
    assert first.checkpoint == str(tmp_path / "out" / "checkpoints" / "checkpoint-000003")
    assert read_manifest_of(first.adapter)["figures"]["stopped"] == "interrupted"
    open_decoder(first.adapter, Source())
    assert "stopping after the step at hand" in said[0]
    second = go()
    assert (second.stopped, second.resumed_from, second.checkpoint) == ("finished", 3, None)
    assert losses(second) == losses(whole)
    assert losses(second)[:3] == losses(first)
    assert adapter_bytes(second.adapter) == adapter_bytes(whole.adapter)
    assert "going on after step 3" in said[1]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert second.seconds >= sum(step["seconds"] for step in second.steps)
    with pytest.raises(ConfigError, match="holds a run that is over"):
        go()


def test_a_run_killed_before_its_result_was_written_goes_on(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.pipeline import tune as stage

    def power_cut(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_save", power_cut)
        with pytest.raises(SystemExit):
            go(config=replace(CONFIG, steps=5))
    assert CheckpointFolder(tmp_path / "out" / "checkpoints").steps() == [2, 4]
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"half")
    record = go(config=replace(CONFIG, steps=5))
    assert record.resumed_from == 4
    assert losses(record) == losses(go(config=replace(CONFIG, steps=5), out=tmp_path / "whole"))


def test_what_is_not_the_same_run_is_named(go: Any, tmp_path: Path, rows_file: Path) -> None:
    go(press_at=3)
    before = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    other_rows = write_json(tmp_path / "other.json", sql_rows(25))
    other_model = write_tiny_llama(tmp_path / "other", seed=1)
    for options, part in (
        ({"config": replace(CONFIG, learning_rate=1e-3)}, "another learning_rate: 0.005 there, 0.001 here"),
        ({"config": replace(CONFIG, steps=7)}, "another steps: 6 there, 7 here"),
        ({"lora": replace(LORA, rank=3)}, "another lora.rank: 2 there, 3 here"),
        ({"data": DataConfig(source=str(other_rows))}, "another data.examples"),
        ({"model": str(other_model)}, "another base.fingerprint"),
        ({"eval_data": str(rows_file)}, "another evaluation data"),
    ):
        with pytest.raises(ConfigError, match=part) as caught:
            go(**options)
        assert "--resume never --overwrite" in caught.value.message
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == before
    assert go(config=replace(CONFIG, save_every=3, keep_last=1, max_seconds=600)).resumed_from == 3


def test_never_begins_anew_where_that_is_allowed(go: Any) -> None:
    go(press_at=3)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        go(resume=ResumeConfig(resume="never"))
    record = go(resume=ResumeConfig(resume="never"), overwrite=True, press_at=1)
    assert (record.resumed_from, len(record.steps)) == (None, 1)
    assert record.checkpoint is not None
    assert record.checkpoint.endswith("checkpoint-000001"), "the other run's are gone"


def test_a_path_goes_on_from_an_older_checkpoint_in_another_folder(go: Any, tmp_path: Path) -> None:
    kept = go(resume=ResumeConfig(keep_checkpoints=True))
    folder = tmp_path / "out" / "checkpoints"
    assert CheckpointFolder(folder).steps() == [4, 6]
    assert kept.checkpoint == str(folder / "checkpoint-000006")
    for path, step in ((folder / "checkpoint-000004", 4), (tmp_path / "out", 6)):
        record = go(out=tmp_path / f"from-{step}", resume=ResumeConfig(resume=str(path)))
        assert record.resumed_from == step
        assert losses(record) == losses(kept)
        assert adapter_bytes(record.adapter) == adapter_bytes(kept.adapter)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        go(out=tmp_path / "new", resume=ResumeConfig(resume=str(tmp_path / "nowhere")))
    (folder / "checkpoint-000004" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        go(out=tmp_path / "new", resume=ResumeConfig(resume=str(folder / "checkpoint-000004")))


def test_a_finished_run_that_is_overwritten_begins_anew(go: Any, tmp_path: Path) -> None:
    keep = ResumeConfig(keep_checkpoints=True)
    go(resume=keep)
    assert not is_unfinished(tmp_path / "out")
    assert go(resume=keep, overwrite=True).resumed_from is None


def test_folders_of_others_are_not_taken_for_an_unfinished_run(go: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints" / "checkpoint-500").mkdir(parents=True)
    assert not is_unfinished(out)
    with pytest.raises(ConfigError, match="is not empty"):
        go()
    (out / "checkpoints" / "checkpoint-500").rename(out / "checkpoints" / ".checkpoint-000002.77.new")
    assert is_unfinished(out), "killed while it wrote its first checkpoint"
    assert go().resumed_from is None
    assert not (out / "checkpoints").exists()


def test_all_checkpoints_damaged_says_so_and_begins_anew(go: Any, tmp_path: Path, said: list[str]) -> None:
    go(press_at=1)
    (tmp_path / "out" / "checkpoints" / "checkpoint-000001" / "state.json").unlink()
    said.clear()
    assert go().resumed_from is None
    assert "is damaged" in said[0]
    assert "beginning anew" in said[1]


def test_other_threads_are_mentioned(go: Any, said: list[str]) -> None:
    go(press_at=2)
    go(source=Source(dtype="float32", threads=2))
    assert any("threads was 1, is 2" in line for line in said)


def test_full_model_goes_on_bit_for_bit(go: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, method="full", learning_rate=1e-3)
    whole = go(config=config, out=tmp_path / "whole")
    go(config=config, press_at=3)
    again = go(config=config)
    assert losses(again) == losses(whole)
    weights = [(Path(record.adapter) / "model.safetensors").read_bytes() for record in (again, whole)]
    assert weights[0] == weights[1]


def test_sigterm_exits_130_and_the_same_command_goes_on(go: Any, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "burnish.cli.main", "tune", str(tiny), "--data", str(rows_file), "--out", str(out)]
    command += "--steps 4000 --micro-batch-size 2 --rank 2 --save-every 5 --precision float32 --json".split()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not CheckpointFolder(out / "checkpoints").steps():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - waited < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    shown, notes = process.communicate(timeout=60)
    assert process.returncode == 130, notes
    assert "the same command goes on from there" in notes
    assert "Traceback" not in notes
    first = json.loads(shown)
    step = len(first["steps"])
    assert first["checkpoint"].endswith(f"checkpoint-{step:06d}")
    record = tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        out=out,
        lora=LoraConfig(rank=2),
        config=TrainConfig(steps=4000, micro_batch_size=2, precision="float32", max_seconds=1e-3),
        source=Source(dtype="float32"),
    )
    assert (record.resumed_from, record.stopped) == (step, "max_seconds")
    assert losses(record) == [item["loss"] for item in first["steps"]]
