"""The program in process, and a tiny model with what tune and merge make of it."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Cli, Done
from made_runs import made_run

from burnish.cli.main import run
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import merge
from burnish.pipeline.opening import Source
from burnish.pipeline.runs import save_run
from burnish.pipeline.tune import tune
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import sql_rows, write_json, write_tiny_llama


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lands in the checkout, no run of the user's is seen, and lines are as wide as on a common terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURNISH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("BURNISH_TRACEBACK", raising=False)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command line in this process; `stdin` is what is piped in."""

    def call(*arguments: object, stdin: str | None = None) -> Done:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Done(code, shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", sql_rows(24))


@pytest.fixture(scope="session")
def adapter(tiny: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        out=tmp_path_factory.mktemp("adapters") / "adapter",
        lora=LoraConfig(rank=4, alpha=8),
        config=TrainConfig(steps=8, micro_batch_size=4, learning_rate=5e-3, precision="float32"),
        source=Source(dtype="float32"),
    )
    return Path(record.adapter)


@pytest.fixture(scope="session")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(merge(str(adapter), out=tmp_path_factory.mktemp("merged") / "merged").out)


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as a demo leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "20261121-101112-demo"
    folder.mkdir()
    save_run(folder, made_run())
    return folder
