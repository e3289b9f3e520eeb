from __future__ import annotations

import json

from made_tokenizers import CHATML, MakeFolder

from burnish.data.examples import make_examples
from burnish.data.inspect import inspect_rows
from burnish.data.rows import BadRow, Row, RowSet
from burnish.data.templates import TEMPLATES
from burnish.data.tokenizer import Tokenizer

ROWS = [
    Row(instruction="Wie heißt 日本?", context="", answer="Japan 😀", file="f.jsonl", number=1),
    Row(instruction="Two?", context="", answer="2", file="f.jsonl", number=3),
    Row(instruction="long " * 300, context="", answer="3", file="f.jsonl", number=4),
]
ROW_SET = RowSet(
    rows=ROWS,
    bad_rows=[BadRow(file="f.jsonl", number=2, reason="answer is empty")] * 12,
    source="f.jsonl",
    layout="question",
    columns=("question", "answer"),
)


def test_rows_are_shown_token_by_token_with_their_mask(make_folder: MakeFolder) -> None:
    for kind in ("byte-level", "byte-fallback"):
        tokenizer = Tokenizer.load(make_folder(kind, {"chat_template": CHATML, "eos_token": "<|im_end|>"}))
        made = make_examples(ROWS, tokenizer, TEMPLATES["chat"], max_length=400)
        view = inspect_rows(ROW_SET, made, tokenizer, num_rows=1).rows[0]
        # Llama-like tokenizers put a space after every special token, and the view shows it as it is.
        assert [text.strip().replace("|> ", "|>") for text, _ in view.segments] == [
            "<|im_start|>user\nWie heißt 日本?<|im_end|>\n<|im_start|>assistant",
            "Japan 😀<|im_end|>",
        ]
        assert [learned for _, learned in view.segments] == [False, True]
        assert "".join(token.text for token in view.tokens) == view.text
        assert view.num_learned == sum(token.learned for token in view.tokens) < view.num_tokens == len(view.tokens)
        assert view.tokens[-1].special
        assert (view.tokens[-1].token, view.tokens[-1].id) == ("<|im_end|>", tokenizer.eos_id)
        assert (view.file, view.number) == ("f.jsonl", 1)


def test_report_counts_everything_and_is_json(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"pad_token": "</s>"}))
    made = make_examples(ROWS, tokenizer, TEMPLATES["alpaca"], max_length=400)
    report = inspect_rows(ROW_SET, made, tokenizer)
    value = json.loads(json.dumps(report.to_dict()))
    assert value["stats"]["num_rows"] == 3
    assert value["stats"]["num_bad_rows"] == 12
    assert value["stats"]["num_too_long"] == 1
    assert len(value["rows"]) == 2
    assert value["bad_rows"] == ["f.jsonl, row 2: answer is empty"] * 10
    assert value["template"] == "alpaca"
    told = dict(report.facts)
    assert told["every answer ends with a learned end token"] == "ok"
    assert told["12 rows are unusable"] == "remark"
    assert any("pad token is an end token" in fact for fact in told)
    assert any("1 rows are longer than 400 tokens" in fact for fact in told)


def test_limit_of_the_tokenizer_is_a_problem_when_exceeded(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"model_max_length": 20}))
    made = make_examples(ROWS[:2], tokenizer, TEMPLATES["alpaca"], max_length=400)
    assert any(
        kind == "problem" and "limit of 20" in fact for fact, kind in inspect_rows(ROW_SET, made, tokenizer).facts
    )
