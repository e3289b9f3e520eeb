"""A tiny model, rows, and what tune and merge make of them, once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import MergeRecord, merge
from burnish.pipeline.opening import Source
from burnish.pipeline.tune import TuneRecord, tune
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import sql_rows, write_json, write_tiny_llama

FAST = TrainConfig(steps=12, micro_batch_size=4, learning_rate=5e-3, precision="float32")
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lands in the checkout, and no run of the user's is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", sql_rows(24))


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("rows") / "held_out.json", sql_rows(30)[24:])


@pytest.fixture(scope="session")
def tuned(tiny: Path, rows_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneRecord:
    """An adapter on the tiny model."""
    return tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        eval_data=str(held_out_file),
        out=tmp_path_factory.mktemp("tuned") / "adapter",
        lora=LORA,
        config=FAST,
        source=Source(dtype="float32"),
    )


@pytest.fixture(scope="session")
def merged(tuned: TuneRecord, tmp_path_factory: pytest.TempPathFactory) -> MergeRecord:
    """The adapter merged into the tiny model."""
    return merge(tuned.adapter, out=tmp_path_factory.mktemp("merged") / "merged")
