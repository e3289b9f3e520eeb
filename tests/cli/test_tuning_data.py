"""The data side of tune and data inspect: splits, streaming, packing, conversations, the preflight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli

from tiny_llama import write_json


@pytest.fixture
def tune(cli: Cli, tiny: Path, tmp_path: Path):
    def call(data: object, *options: object):
        return cli("tune", tiny, "--data", data, "--out", tmp_path / "out", "--steps", 2, "--rank", 2, *options)

    return call


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(3) for role in ("user", "assistant")]
    return write_json(tmp_path / "chats.json", [{"messages": turns}] * 2)


def test_every_data_option_at_once(tune, rows_file: Path) -> None:
    record = tune(rows_file, "--eval-split", 0.2, "--streaming", "--pack-to", 300, "--json").json
    assert record["num_evaluated"] > 0
    assert record["num_evaluated"] + record["num_examples"] == 24
    assert record["evals"][-1]["loss"] > 0
    assert max(step["tokens"] for step in record["steps"]) <= 300
    assert record["preflight"]["errors"] == []
    assert record["preflight"]["num_checked"] == 24


def test_impossible_data_options_are_one_line(tune, rows_file: Path) -> None:
    tune(rows_file, "--eval-split", 2.5).fails(2, "2.5", "a share below 1")
    tune(rows_file, "--eval-split", 24).fails(2, "no row is left to train on", "24 rows")
    tune(rows_file, "--eval-split", 0.1, "--eval-data", rows_file).fails(2, "--eval-data", "--eval-split")
    tune(rows_file, "--pack-to", 0).fails(2, "--pack-to", "at least 1")
    tune(rows_file, "--pack-to", 300, "--gradient-accumulation", 2).fails(2, "--pack-to", "--gradient-accumulation")
    tune(rows_file, "--learn", "first").fails(2, "learn", "all or last")


def test_inspect_shows_all_answers_of_a_conversation_or_the_last(cli: Cli, chats: Path) -> None:
    def learned(*options: object) -> list[str]:
        (row, *_) = cli("data", "inspect", chats, "--rows", 1, "--json", *options).json["rows"]
        return [text for text, is_learned in row["segments"] if is_learned]

    assert [text.split("<")[0].strip() for text in learned()] == ["assistant 0", "assistant 1", "assistant 2"]
    assert [text.split("<")[0].strip() for text in learned("--learn", "last")] == ["assistant 2"]
    assert "1 rows are duplicates" in cli("data", "inspect", chats).out


def test_inspect_says_what_was_cut(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "ship " * 100}) + "\n")
    done = cli("data", "inspect", path, "--max-length", 20, "--too-long", "truncate")
    assert done.code == 0
    assert "cut to fit" in done.out
    assert "lost their end token" in done.out.replace("\n", " ")


def test_inspect_ends_with_an_error_where_the_preflight_fails(cli: Cli, rows_file: Path, monkeypatch) -> None:
    from burnish.data import examples

    real = examples.make_example

    def endless(row, tokenizer, template):
        made = real(row, tokenizer, template)
        object.__setattr__(made, "tokens", made.tokens[:-1])
        object.__setattr__(made, "labels", made.labels[:-1])
        return made

    monkeypatch.setattr(examples, "make_example", endless)
    cli("data", "inspect", rows_file).fails(2, "24 answers end without an end token")
