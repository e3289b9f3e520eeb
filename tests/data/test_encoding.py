from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_tokenizers import CHATML, ZEPHYR_LIKE, MakeFolder

from burnish.data.encoding import IGNORE, content_key
from burnish.data.examples import make_example, make_examples
from burnish.data.rows import Row, RowSet, read_rows
from burnish.data.templates import TEMPLATES, pick_template
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

CHAT = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
SAID = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "content": "These."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]
FORGETFUL = CHATML.replace(
    "message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else '...')"
)


def read(folder: Path, *values: object) -> RowSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return read_rows(path, texts=True)


def learned(tokens: list[int], labels: list[int], tokenizer: Tokenizer) -> str:
    shown = [token if label != IGNORE else None for token, label in zip(tokens, labels)]
    return "|".join(
        tokenizer.decode([token], skip_special_tokens=False) if token is not None else "" for token in shown
    )


def test_all_answers_of_a_conversation_are_learned_in_one_row(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(settings=CHAT))
    rows = read(tmp_path, {"messages": SAID}, {"messages": SAID[:3]})
    assert len(rows) == 4
    made = make_examples(rows.rows, tokenizer, TEMPLATES["chat"], max_length=400)
    whole, single = made.examples
    apart = [make_example(row, tokenizer, TEMPLATES["chat"]) for row in rows.rows[:3]]
    assert whole.tokens == apart[-1].tokens
    expected = [IGNORE] * len(whole.tokens)
    for turn in apart:
        expected[turn.num_prompt_tokens : len(turn.tokens)] = turn.tokens[turn.num_prompt_tokens :]
    assert whole.labels == expected
    text = learned(whole.tokens, whole.labels, tokenizer).replace("|", "")
    assert text == "Three.<>These.<>Welcome.<>".replace("<>", "<im_end>")
    assert (whole.num_answers, single.num_answers) == (3, 1)
    assert not made.preflight.errors
    assert made.preflight.num_checked == 2


def test_last_answer_only_when_asked(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(settings=CHAT))
    rows = read(tmp_path, {"messages": SAID})
    (last,) = make_examples(rows.rows, tokenizer, TEMPLATES["chat"], max_length=400, learn="last").examples
    assert last.labels == make_example(rows.rows[-1], tokenizer, TEMPLATES["chat"]).labels
    with pytest.raises(DataError, match="all or last"):
        make_examples(rows.rows, tokenizer, TEMPLATES["chat"], max_length=400, learn="first")  # type: ignore[arg-type]


@pytest.mark.parametrize(("template", "rows"), [(FORGETFUL, 3), (ZEPHYR_LIKE, 1)])
def test_turns_stay_apart_where_a_template_rewrites_them(
    make_folder: MakeFolder, tmp_path: Path, template: str, rows: int
) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": template, "eos_token": "</s>"}))
    found = read(tmp_path, {"messages": SAID})
    made = make_examples(found.rows, tokenizer, TEMPLATES["chat"], max_length=400)
    assert len(made) == rows
    assert sum(example.num_answers for example in made.examples) == 3
    assert len({example.key for example in made.examples}) == 1
    assert not made.preflight.errors


def test_conversation_that_is_too_long_gives_the_turns_that_fit(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(settings=CHAT))
    rows = read(tmp_path, {"messages": SAID})
    sizes = [len(make_example(row, tokenizer, TEMPLATES["chat"]).tokens) for row in rows.rows]
    made = make_examples(rows.rows, tokenizer, TEMPLATES["chat"], max_length=sizes[1])
    assert [len(example.tokens) for example in made.examples] == sizes[:2]
    assert made.stats.num_too_long == 1


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_plain_text_is_learned_whole(make_folder: MakeFolder, tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.load(make_folder(kind, {"chat_template": CHATML}))
    rows = read(tmp_path, {"text": "Once upon a time", "meta": 1})
    template = pick_template("auto", tokenizer, rows)
    assert (rows.layout, template.name) == ("text", "plain")
    (example,) = make_examples(rows.rows, tokenizer, template, max_length=100).examples
    begin = 1 if kind == "byte-fallback" else 0
    assert example.num_prompt_tokens == begin
    assert example.labels[begin:] == example.tokens[begin:]
    assert example.tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.tokens).strip() == "Once upon a time"


def test_text_cut_at_its_end_loses_its_end_token_and_says_so(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder())
    rows = read(tmp_path, {"text": "name " * 50}, {"text": "name"})
    made = make_examples(rows.rows, tokenizer, TEMPLATES["plain"], max_length=10, too_long="truncate")
    long, short = made.examples
    assert (len(long.tokens), long.truncated, long.end_cut) == (10, True, True)
    assert tokenizer.eos_id not in long.tokens
    assert short.tokens[-1] == tokenizer.eos_id
    assert not made.preflight.errors
    assert any("1 texts were cut at their end" in line for line in made.preflight.warnings)


def test_texts_are_taken_only_where_they_are_asked_for(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder())
    rows = read(tmp_path, {"text": "name"})
    with pytest.raises(DataError, match="fit no known layout"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="needs prompts"):
        pick_template("alpaca", tokenizer, rows)
    named = read_rows(tmp_path / "rows.jsonl", columns={"text": "text"}, texts=True)
    assert named.rows[0].answer == "name"


def test_prompt_and_completion_stand_as_they_are_in_plain(make_folder: MakeFolder, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder())
    rows = read(tmp_path, {"prompt": "SELECT name FROM ", "completion": "employee"})
    (example,) = make_examples(rows.rows, tokenizer, TEMPLATES["plain"], max_length=50).examples
    assert tokenizer.decode(example.tokens) == "SELECT name FROM employee"
    assert tokenizer.decode(example.tokens[example.num_prompt_tokens :]) == "employee"


def test_key_is_of_the_content_alone() -> None:
    row = Row(instruction="a  b", context="", answer="c", file="x", number=1)
    same = Row(instruction="a b ", context=" ", answer="c\n", file="y", number=9, extra={"id": 3})
    assert content_key(row) == content_key(same)
    assert content_key(row) != content_key(Row(instruction="a b", context="c", answer="c"))
    assert content_key(row) != content_key(Row(instruction="a", context="", answer="b c"))
