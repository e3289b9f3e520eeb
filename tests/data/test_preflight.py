from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_tokenizers import CHATML, LLAMA3_LIKE, MakeFolder

from burnish.data.encoding import IGNORE, Example, make_example
from burnish.data.examples import make_examples
from burnish.data.preflight import Preflight, PreflightCounter
from burnish.data.rows import Row
from burnish.data.templates import TEMPLATES, Template
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

ROW = Row(instruction="How many?", context="", answer="SELECT 1", file="f", number=1)


def examine(tokenizer: Tokenizer, *examples: Example, template: Template = TEMPLATES["alpaca"]) -> Preflight:
    counter = PreflightCounter(tokenizer, template)
    for example in examples:
        counter.add(example)
    return counter.result(num_too_long=0, max_length=100)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_good_rows_pass_without_a_word(make_folder: MakeFolder, kind: str, name: str) -> None:
    tokenizer = Tokenizer.load(make_folder(kind, {"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    rows = [replace(ROW, answer=f"SELECT {number}\n  FROM t -- é 😀", context="t (a)") for number in range(5)]
    flight = make_examples(rows, tokenizer, TEMPLATES[name], max_length=400).preflight
    assert flight.errors == flight.warnings == ()
    assert flight.require(vocab_size=1000) is flight
    assert Preflight.from_dict(json.loads(json.dumps(flight.to_dict()))) == flight


def test_answer_without_a_learned_end_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    good = make_example(ROW, tokenizer, TEMPLATES["alpaca"])
    masked = replace(good, labels=[*good.labels[:-1], IGNORE])
    absent = replace(good, tokens=good.tokens[:-1], labels=good.labels[:-1])
    flight = examine(tokenizer, good, masked, absent)
    assert flight.num_without_end == 2
    assert not flight.ends_learned
    with pytest.raises(DataError, match="2 answers end without an end token") as caught:
        flight.require()
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_mask_that_is_not_the_answer_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    good = make_example(ROW, tokenizer, TEMPLATES["alpaca"])
    start = good.num_prompt_tokens
    into_prompt = replace(good, labels=[*good.labels[: start - 1], *good.tokens[start - 1 :]])
    too_late = replace(good, labels=[*good.labels[:start], IGNORE, *good.labels[start + 1 :]])
    shifted = replace(good, labels=[*good.labels[:start], *[label + 1 for label in good.labels[start:]]])
    assert examine(tokenizer, good).num_wrong_masks == 0
    assert examine(tokenizer, good, into_prompt, too_late, shifted).num_wrong_masks == 3


def test_mask_of_a_conversation_has_a_run_for_each_answer(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    end = tokenizer.eos_id
    assert end is not None
    row = replace(ROW, instruction="", answer="x")
    tokens, labels = [9, 10, end, 9, 11, end], [IGNORE, 10, end, IGNORE, 11, end]
    good = Example(tokens=tokens, labels=labels, num_prompt_tokens=4, row=row, num_answers=2)
    unended = replace(good, labels=[IGNORE, 10, IGNORE, IGNORE, 11, end])
    one_run = replace(good, labels=[IGNORE] * 4 + [11, end])
    wrong = replace(good, labels=[IGNORE, 12, end, IGNORE, 11, end])
    plain = TEMPLATES["plain"]
    assert examine(tokenizer, good, template=plain).num_wrong_masks == 0
    assert examine(tokenizer, unended, one_run, wrong, template=plain).num_wrong_masks == 3


def test_prompt_that_differs_from_inference_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    good = make_example(ROW, tokenizer, TEMPLATES["alpaca"])
    other = replace(good, tokens=[7, *good.tokens[1:]])
    flight = examine(tokenizer, other)
    assert not flight.prompts_are_prefixes
    with pytest.raises(DataError, match="1 of 1 prompts have other token ids"):
        flight.require()


def test_token_beyond_the_models_vocabulary_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    flight = make_examples([ROW], tokenizer, TEMPLATES["alpaca"], max_length=200).preflight
    with pytest.raises(DataError, match=f"token {flight.largest_id} is beyond"):
        flight.require(vocab_size=flight.largest_id)
    flight.require(vocab_size=flight.largest_id + 1)


def test_duplicates_and_doubled_begins_are_counted(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder("byte-fallback"))
    rows = [ROW, replace(ROW, number=2), replace(ROW, answer="SELECT 2"), replace(ROW, number=3)]
    flight = make_examples(rows, tokenizer, TEMPLATES["alpaca"], max_length=200).preflight
    assert flight.num_duplicates == 2
    assert "2 rows are duplicates" in flight.warnings
    doubled = make_examples([replace(ROW, instruction="<s>x")], tokenizer, TEMPLATES["plain"], max_length=200)
    assert doubled.preflight.num_doubled_begins == 1
    assert flight.num_doubled_begins == 0


def test_text_that_a_tokenizer_cannot_hold_is_told(make_folder: MakeFolder) -> None:
    from tokenizers import normalizers

    tokenizer = Tokenizer.load(make_folder())
    tokenizer.backend.normalizer = normalizers.Lowercase()
    flight = make_examples([ROW], tokenizer, TEMPLATES["alpaca"], max_length=200).preflight
    assert (flight.num_other_texts, flight.num_other_answers) == (1, 1)
    assert not flight.answers_round_trip
    assert any("1 of 1 answers change" in line for line in flight.warnings)


def test_bad_rows_are_counted_by_reason(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    flight = make_examples([ROW], tokenizer, TEMPLATES["alpaca"], max_length=200).preflight
    told = flight.with_bad_rows(["answer is empty", "answer is null", "not valid JSON"])
    assert (told.num_bad_rows, told.num_empty_answers) == (3, 2)
    assert told.warnings[-1] == "3 rows are unusable, 2 of them because a text is empty"
    assert flight.with_bad_rows([]).warnings == flight.warnings


def test_real_rows_on_real_tokenizers_have_no_errors(shared_data: Path) -> None:
    from burnish.data.rows import read_rows

    rows = read_rows(shared_data / "alpaca" / "alpaca_en_demo_1000.json", limit=100).rows
    for name in ("gpt2", "mistral-v1"):
        tokenizer = Tokenizer.load(shared_data / "tokenizers" / name)
        flight = make_examples(rows, tokenizer, TEMPLATES["alpaca"], max_length=1024).preflight
        assert flight.errors == ()
        assert (flight.num_other_texts, flight.num_other_answers) == (0, 0), name


def test_chat_rows_on_a_template_with_begin_token_have_one(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder("byte-fallback", {"chat_template": LLAMA3_LIKE}))
    flight = make_examples([ROW], tokenizer, TEMPLATES["chat"], max_length=300).preflight
    assert flight.num_doubled_begins == 0
    assert flight.errors == ()
