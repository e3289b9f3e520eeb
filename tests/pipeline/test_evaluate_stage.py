from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from burnish.data.text_to_sql.generate import generate
from burnish.errors import ConfigError, DataError
from burnish.pipeline.evaluate import evaluate
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.tune import TuneRecord
from tiny_llama import write_json, write_tiny_llama

FLOAT = Source(dtype="float32")


def test_text_to_sql_counts_rows_and_kinds(merged: MergeRecord) -> None:
    record = evaluate(merged.out, data=DataConfig(source="text-to-sql:test:6"), max_tokens=8, source=FLOAT)
    assert record.metric == "execution accuracy"
    assert record.num_rows == 6
    assert record.score is not None
    assert record.score_low is not None
    assert record.score_high is not None
    assert 0 <= record.score_low <= record.score <= record.score_high <= 1
    assert record.template == "chat"
    assert record.by_kind is not None
    assert sum(kind["num_rows"] for kind in record.by_kind.values()) == 6
    assert record.answers is not None
    assert [answer["gold"] for answer in record.answers] == [row["answer"] for row in generate("test", 6, seed=0)]


def test_perplexity_of_a_text_file_is_finite_and_counts_tokens(merged: MergeRecord, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The ship left the harbour in 1990. " * 40, encoding="utf-8")
    record = evaluate(merged.out, task="perplexity", data=DataConfig(source=str(tmp_path / "text.txt")), source=FLOAT)
    tokens = open_decoder(merged.out, FLOAT).tokenizer.encode_prompt("The ship left the harbour in 1990. " * 40)
    assert record.perplexity is not None
    assert record.num_tokens == len(tokens) - 1
    assert math.isfinite(record.perplexity)
    assert record.perplexity > 1
    assert record.template is None


def test_perplexity_of_text_rows_differs_from_that_of_other_text(merged: MergeRecord, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "A ship."}\n{"text": "Two ships left."}\n', encoding="utf-8")
    record = evaluate(merged.out, task="perplexity", data=DataConfig(source=str(tmp_path / "a.jsonl")), source=FLOAT)
    first = evaluate(
        merged.out, task="perplexity", data=DataConfig(source=str(tmp_path / "a.jsonl"), limit=1), source=FLOAT
    )
    assert record.num_tokens is not None
    assert first.num_tokens is not None
    assert 0 < first.num_tokens < record.num_tokens


def test_perplexity_of_rows_falls_with_tuning(tiny: Path, merged: MergeRecord, held_out_file: Path) -> None:
    data = DataConfig(source=str(held_out_file))
    before = evaluate(str(tiny), task="perplexity", data=data, source=FLOAT).perplexity
    after = evaluate(merged.out, task="perplexity", data=data, source=FLOAT).perplexity
    assert before is not None
    assert after is not None
    assert after < 0.8 * before


def test_bleu_is_whole_for_the_models_own_answers(merged: MergeRecord, rows_file: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(rows_file), limit=3)
    record = evaluate(merged.out, task="bleu", data=data, max_tokens=12, source=FLOAT)
    assert record.metric == "BLEU"
    assert record.answers is not None
    own = [
        {"question": row["question"], "context": row["context"], "answer": answer["predicted"]}
        for row, answer in zip(json.loads(rows_file.read_text()), record.answers)
    ]
    again = evaluate(
        merged.out,
        task="bleu",
        data=DataConfig(source=str(write_json(tmp_path / "own.json", own))),
        max_tokens=12,
        source=FLOAT,
    )
    assert again.score == pytest.approx(100.0)
    assert again.exact_match == 1.0
    assert record.score is not None
    assert record.score < 100


def test_against_itself_nothing_diverges(merged: MergeRecord, held_out_file: Path) -> None:
    data = DataConfig(source=str(held_out_file))
    record = evaluate(merged.out, task="perplexity", data=data, against=merged.out, source=FLOAT)
    assert record.kl_mean == pytest.approx(0, abs=1e-6)
    assert record.greedy_agreement == 1.0
    assert record.against == merged.out


def test_against_the_base_the_tuned_model_diverges(tiny: Path, tuned: TuneRecord, held_out_file: Path) -> None:
    data = DataConfig(source=str(held_out_file))
    record = evaluate(tuned.adapter, data=data, against=str(tiny), max_tokens=4, source=FLOAT)
    assert record.kl_mean is not None
    assert record.kl_p99 is not None
    assert record.kl_mean > 1e-3
    assert record.kl_p99 >= record.kl_mean
    assert record.perplexity is not None


def test_parent_with_another_vocabulary_is_refused(
    merged: MergeRecord, held_out_file: Path, tmp_path: Path, shared_data: Path
) -> None:
    data = DataConfig(source=str(held_out_file))
    with pytest.raises(ConfigError, match="another vocabulary"):
        evaluate(
            merged.out,
            task="perplexity",
            data=data,
            against=str(shared_data / "models" / "stories260k"),
            source=FLOAT,
        )


def test_adapter_on_another_base_is_refused(tuned: TuneRecord, held_out_file: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=9)
    with pytest.raises(ConfigError, match="base"):
        evaluate(str(other), adapter=tuned.adapter, data=DataConfig(source=str(held_out_file)), source=FLOAT)


def test_unknown_task_lists_the_tasks(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="text-to-sql, perplexity, bleu"):
        evaluate(str(tiny), task="rouge")


def test_empty_text_is_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        evaluate(str(tiny), task="perplexity", data=DataConfig(source=str(tmp_path / "empty.txt")))
