from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from pipeline_fakes import logits_of, read_manifest_of

from burnish.errors import ConfigError, DataError
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.tune import TuneRecord, tune
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from tiny_llama import write_json

TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]


def test_loss_falls_and_every_step_is_on_record(tuned: TuneRecord) -> None:
    assert [step["step"] for step in tuned.steps] == list(range(1, 13))
    assert all(step["tokens"] > 0 and step["seconds"] > 0 for step in tuned.steps)
    assert tuned.steps[-1]["loss"] < tuned.steps[0]["loss"] - 0.5
    assert tuned.evals[-1]["loss"] < tuned.steps[0]["loss"]
    assert tuned.stopped == "finished"
    assert tuned.tokens_per_s > 0
    assert tuned.peak_memory_bytes >= tuned.loaded_memory_bytes
    assert tuned.predicted_peak_bytes is not None
    assert (tuned.num_examples, tuned.num_bad_rows, tuned.num_too_long) == (24, 0, 0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_adapter_gives_equal_logits_in_peft(tiny: Path, tuned: TuneRecord) -> None:
    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), tuned.adapter).eval()
    ours = open_decoder(tuned.adapter, Source(dtype="float32"))
    base = open_decoder(str(tiny), Source(dtype="float32"))
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits_of(ours.decoder, TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert (logits_of(base.decoder, TOKENS) - expected).abs().max() > 1e-2, "the adapter changes nothing"


def test_manifest_says_what_went_in(tiny: Path, tuned: TuneRecord, rows_file: Path, held_out_file: Path) -> None:
    record = read_manifest_of(tuned.adapter)
    assert record["kind"] == "adapter"
    assert record["inputs"]["base"]["path"] == str(tiny)
    assert len(record["inputs"]["base"]["fingerprint"]) == 64
    assert record["config"]["lora"]["rank"] == 4
    assert record["config"]["train"]["learning_rate"] == 5e-3
    assert record["data"]["source"] == str(rows_file)
    assert record["data"]["eval_source"] == str(held_out_file)
    assert record["data"]["template"] == "chat"
    assert record["data"]["multi_turn"] is False
    assert {"torch", "burnish"} <= set(record["versions"])
    logged = {"phases", "memory"}  # steps.jsonl has them
    assert record["figures"]["steps"] == [{k: v for k, v in step.items() if k not in logged} for step in tuned.steps]
    tokenizer = open_decoder(str(tiny), Source()).tokenizer
    assert record["chat_template"] == tokenizer.chat_template
    assert record["golden_tokens"]["ids"] == tokenizer.encode(record["golden_tokens"]["text"])


def test_full_tuning_writes_a_model_that_transformers_loads(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    record = tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        out=tmp_path / "full",
        config=TrainConfig(method="full", steps=3, micro_batch_size=4, learning_rate=1e-3, precision="float32"),
        source=Source(dtype="float32"),
    )
    assert record.trained_parameters == open_decoder(str(tiny), Source()).decoder.config.num_parameters()
    ours = open_decoder(str(tmp_path / "full"), Source(dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits_of(ours.decoder, TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert read_manifest_of(tmp_path / "full")["kind"] == "tuned"
    assert read_manifest_of(tmp_path / "full")["config"]["lora"] is None


def test_same_seed_gives_the_same_losses(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=3, micro_batch_size=4, learning_rate=5e-3, precision="float32", seed=3)

    def losses(name: str, seed: int) -> list[float]:
        record = tune(
            str(tiny),
            data=DataConfig(source=str(rows_file)),
            out=tmp_path / name,
            lora=LoraConfig(rank=4, alpha=8),
            config=replace(config, seed=seed),
            source=Source(dtype="float32"),
        )
        return [step["loss"] for step in record.steps]

    assert losses("a", 3) == losses("b", 3) != losses("c", 4)


def test_bad_rows_are_left_out_and_named(tiny: Path, tmp_path: Path) -> None:
    good = {"question": "How many?", "context": "CREATE TABLE t (a INTEGER);", "answer": "SELECT COUNT(*) FROM t"}
    rows = [good, {**good, "answer": ""}, good, {**good, "answer": "SELECT b FROM nowhere"}, "text"]
    record = tune(
        str(tiny),
        data=DataConfig(source=str(write_json(tmp_path / "mixed.json", rows)), check_sql=True),
        out=tmp_path / "out",
        lora=LoraConfig(rank=2, alpha=4),
        config=TrainConfig(steps=1, micro_batch_size=2),
    )
    assert (record.num_examples, record.num_bad_rows) == (2, 3)
    assert ["mixed.json" in line for line in record.bad_rows] == [True] * 3
    assert "2" in record.bad_rows[0]
    assert "nowhere" in record.bad_rows[1]


def test_tuning_an_adapter_is_refused(tuned: TuneRecord, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an adapter"):
        tune(tuned.adapter, data=DataConfig(source=str(rows_file)), out=tmp_path / "out")


def test_rows_that_are_all_too_long_stop_the_run_before_training(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than 8 tokens"):
        tune(str(tiny), data=DataConfig(source=str(rows_file), max_length=8), out=tmp_path / "out")


def test_interrupt_saves_what_was_learned(
    tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def press_ctrl_c(label: str, done: int, total: int, note: str = "") -> None:
        calls.append(done)
        if done == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt

    record = tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        out=tmp_path / "out",
        lora=LoraConfig(rank=2, alpha=4),
        config=TrainConfig(steps=50, micro_batch_size=2),
        progress=press_ctrl_c,
    )
    assert record.interrupted
    assert 3 <= len(record.steps) < 50
    assert json.loads((tmp_path / "out" / "burnish.json").read_text())["figures"]["stopped"] == "interrupted"
    open_decoder(str(tmp_path / "out"), Source())
