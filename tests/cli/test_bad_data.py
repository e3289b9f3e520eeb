"""Data sets and prompt files that cannot be used: one clear line, exit code 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Cli

from tiny_llama import SCHEMA, sql_rows, write_json


@pytest.fixture
def tune(cli: Cli, tiny: Path, tmp_path: Path):
    def call(data: object, *options: object):
        return cli("tune", tiny, "--data", data, "--out", tmp_path / "out", "--steps", 1, *options)

    return call


def test_missing_file_names_it(tune, tmp_path: Path) -> None:
    tune(tmp_path / "rows.json").fails(2, "there is no file", "rows.json")


def test_folder_instead_of_a_file_says_so(tune, tmp_path: Path) -> None:
    (tmp_path / "rows.json").mkdir()
    tune(tmp_path / "rows.json").fails(2, "is a folder")


def test_unknown_ending_lists_the_known_kinds(tune, tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("x")
    tune(tmp_path / "rows.xlsx").fails(2, ".xlsx", ".jsonl", ".csv")


def test_unknown_columns_list_those_found(tune, tmp_path: Path) -> None:
    path = write_json(tmp_path / "rows.json", [{"q": "a", "a": "b"}])
    tune(path).fails(2, "q, a", "--columns instruction=")


def test_misspelt_column_is_guessed(tune, tmp_path: Path) -> None:
    path = write_json(tmp_path / "rows.json", [{"quesion": "a", "reply": "b"}])
    tune(path, "--columns", "instruction=question,answer=reply").fails(2, "question", "Did you mean quesion?")
    tune(path, "--columns", "instructions=quesion,answer=reply").fails(2, "Did you mean instruction?")


@pytest.mark.parametrize("text", ["", "instruction", "=a", "a="])
def test_malformed_columns_show_the_form(tune, rows_file: Path, text: str) -> None:
    tune(rows_file, "--columns", text).fails(2, "--columns", "FIELD=COLUMN")


@pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.json", ""), ("a.jsonl", "\n"), ("a.csv", "")])
def test_empty_data_set_says_so(tune, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    tune(tmp_path / name).fails(2, name)


def test_all_rows_bad_names_the_first_reason(tune, tmp_path: Path) -> None:
    rows = [{"question": "How many?", "context": SCHEMA, "answer": ""}] * 3
    tune(write_json(tmp_path / "rows.json", rows)).fails(2, "all 3 rows", "answer is empty")


def test_all_rows_failing_the_sql_check_name_the_first_reason(tune, tmp_path: Path) -> None:
    rows = [{"question": "How many?", "context": SCHEMA, "answer": "SELECT x FROM boat"}] * 2
    tune(write_json(tmp_path / "rows.json", rows), "--check-sql").fails(2, "all 2 rows", "boat")


def test_broken_json_names_line_and_column(tune, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"data": [1,, 2]}')
    tune(tmp_path / "rows.json").fails(2, "rows.json", "line 1")


def test_binary_data_says_it_is_not_text(tune, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b"\xff\xfe\x00")
    tune(tmp_path / "rows.json").fails(2, "rows.json", "UTF-8")


def test_all_rows_too_long_name_the_shortest(tune, rows_file: Path) -> None:
    tune(rows_file, "--max-length", 10).fails(2, "all 24 rows are longer than 10 tokens", "--max-length")


def test_all_labels_masked_by_truncation_says_so(cli: Cli, tune, tmp_path: Path, monkeypatch) -> None:
    from burnish.data import examples

    real = examples.make_example

    def masked(row, tokenizer, template):
        example = real(row, tokenizer, template)
        return replace(example, labels=[-100] * len(example.tokens))

    monkeypatch.setattr(examples, "make_example", masked)
    tune(write_json(tmp_path / "rows.json", sql_rows(3))).fails(2, "all labels are masked")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("text-to-sql:tset", "Did you mean text-to-sql:test?"),
        ("text-to-sql:train:0", "above 0"),
        ("text-to-sql:train:x", "above 0"),
    ],
)
def test_bundled_rows_that_do_not_exist_are_refused(tune, source: str, part: str) -> None:
    tune(source).fails(2, part)


def test_bad_evaluation_rows_stop_before_training(tune, rows_file: Path, tmp_path: Path) -> None:
    tune(rows_file, "--eval-data", tmp_path / "nowhere.json").fails(2, "nowhere.json")


def test_unknown_template_lists_the_known(tune, rows_file: Path) -> None:
    tune(rows_file, "--template", "chatty").fails(2, "chatty", "alpaca", "sql-context")


def test_same_lines_from_eval_and_inspect(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    cli("eval", tiny, "--data", tmp_path / "no.json").fails(2, "there is no file", "no.json")
    cli("eval", tiny, "--task", "perplexity", "--data", tmp_path / "no.txt").fails(2, "there is no file", "no.txt")
    cli("data", "inspect", tmp_path / "no.json", "--model", tiny).fails(2, "there is no file", "no.json")


def test_prompts_file_names_the_bad_line(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    def with_lines(*lines: str):
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        return cli("generate", tiny, "--prompts", tmp_path / "prompts.jsonl", "--max-tokens", 1)

    good = json.dumps({"prompt": "SELECT"})
    with_lines(good, "", "{oops").fails(2, "prompts.jsonl line 3 is not JSON")
    with_lines(good, '{"text": "x"}').fails(2, "prompts.jsonl line 2 has no prompt")
    with_lines("").fails(2, "holds no prompts")
    with_lines(good, '{"messages": [{"role": "user"}]}').fails(2, "prompts.jsonl line 2 has malformed messages")
    with_lines(good, '{"messages": ["hello"]}').fails(2, "prompts.jsonl line 2 has malformed messages")
    with_lines(good, '{"prompt": [1, "x"]}').fails(2, "prompts.jsonl line 2")
    cli("generate", tiny, "--prompts", tmp_path / "no.txt").fails(2, "there is no file", "no.txt")


def test_prompt_longer_than_the_context_gives_both_lengths(cli: Cli, tiny: Path) -> None:
    cli("generate", tiny, "--prompt", "ship " * 400, "--max-tokens", 4).fails(2, "256")
    cli("chat", tiny, "--quiet", stdin="ship " * 400 + "\n").fails(2, "256")


def test_empty_prompt_is_refused(cli: Cli, tiny: Path) -> None:
    cli("generate", tiny, "--prompt", "", "--max-tokens", 1).fails(2, "prompt")


def test_context_file_that_is_missing_is_named(cli: Cli, tiny: Path) -> None:
    cli("chat", tiny, "--context", "@schema.sql", stdin="x\n").fails(2, "schema.sql")
