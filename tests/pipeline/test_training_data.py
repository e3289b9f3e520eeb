from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish.data.token_cache import TokenCache
from burnish.data.tokenizer import Tokenizer
from burnish.errors import CapacityError, ConfigError, DataError
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.training_data import EvaluationChoice, TrainingData, training_data
from burnish.pipeline.tune import TuneRecord, tune
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import sql_rows, write_json


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.load(tiny)


def prepared(source: Path, tokenizer: Tokenizer, split: float | None = None, **options: Any) -> TrainingData:
    return training_data(DataConfig(source=str(source)), tokenizer, evaluation=EvaluationChoice(split=split), **options)


def contents(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tokens) for row in rows]


@pytest.mark.parametrize("split", [None, 0.25, 5])
def test_streamed_data_equals_data_in_memory(tokenizer: Tokenizer, rows_file: Path, split: float | None) -> None:
    memory = prepared(rows_file, tokenizer, split)
    stream = prepared(rows_file, tokenizer, split, streaming=True)
    assert isinstance(stream.examples, TokenCache)
    assert contents(stream.examples) == contents(memory.examples)
    assert contents(stream.evaluation or []) == contents(memory.evaluation or [])
    assert replace(stream, examples=[], evaluation=None, cache=None) == replace(memory, examples=[], evaluation=None)


def test_split_keeps_duplicates_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_json(tmp_path / "rows.json", sql_rows(40) * 2)
    data = prepared(source, tokenizer, 0.3)
    assert data.evaluation
    assert not set(contents(data.examples)) & set(contents(data.evaluation))
    assert len(data.examples) + len(data.evaluation) == 80
    assert data.preflight.num_duplicates == 40


def test_failed_preflight_stops_before_anything_else(tokenizer: Tokenizer, rows_file: Path) -> None:
    with pytest.raises(DataError, match="beyond the model's vocabulary of 100"):
        prepared(rows_file, tokenizer, vocab_size=100)


def test_two_sources_of_evaluation_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="both --eval-data and --eval-split"):
        EvaluationChoice(source="x.json", split=0.1)
    with pytest.raises(ConfigError, match="a share below 1"):
        EvaluationChoice(split=-1)


def test_full_disk_is_one_line(tokenizer: Tokenizer, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.data import token_cache_building

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache_building._Writer, "flush", full)
    with pytest.raises(CapacityError, match="no space left"):
        training_data(DataConfig(source=str(rows_file), max_length=301), tokenizer, streaming=True)


def run(tiny: Path, rows: Path, out: Path, **options: Any) -> TuneRecord:
    settings = options.pop("config", TrainConfig(steps=3, micro_batch_size=4, precision="float32"))
    return tune(
        str(tiny),
        data=DataConfig(source=str(rows)),
        out=out,
        lora=LoraConfig(rank=2, alpha=4),
        config=settings,
        **options,
    )


def test_tuning_from_disk_gives_the_same_losses(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    memory = run(tiny, rows_file, tmp_path / "memory", eval_split=0.2)
    stream = run(tiny, rows_file, tmp_path / "stream", eval_split=0.2, streaming=True)
    assert [step["loss"] for step in stream.steps] == [step["loss"] for step in memory.steps]
    assert stream.evals[-1]["loss"] == memory.evals[-1]["loss"]
    assert memory.num_evaluated > 0
    assert memory.num_evaluated + memory.num_examples == 24
    assert memory.preflight["errors"] == ()
    written = json.loads((tmp_path / "memory" / "burnish.json").read_text())
    assert written["data"]["eval_split"] == 0.2
    assert written["figures"]["preflight"]["num_examples"] == 24


def test_steps_are_filled_to_so_many_tokens(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(tokens_per_step=400, micro_batch_size=4, precision="float32")
    record = run(tiny, rows_file, tmp_path / "out", config=config)
    tokens = [step["tokens"] for step in record.steps]
    assert max(tokens) <= 400
    assert min(tokens[:-1], default=400) > 200
    plain = run(tiny, rows_file, tmp_path / "plain", config=TrainConfig(micro_batch_size=4, precision="float32"))
    assert sum(tokens) == sum(step["tokens"] for step in plain.steps)


def test_plain_texts_tune_a_model(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"SELECT {n} FROM ship WHERE built > {n}"}) + "\n" for n in range(9)))
    record = run(tiny, source, tmp_path / "out", eval_split=2)
    assert (record.num_examples, record.num_evaluated) == (7, 2)
    assert json.loads((tmp_path / "out" / "burnish.json").read_text())["data"]["template"] == "plain"
