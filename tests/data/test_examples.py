from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import CHATML, LLAMA3_LIKE, ZEPHYR_LIKE, MakeFolder

from burnish.data.examples import IGNORE, make_example, make_examples
from burnish.data.rows import Row, read_rows
from burnish.data.templates import TEMPLATES, pick_template, row_prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

ROW = Row(
    instruction="How many?", context="CREATE TABLE t (a INTEGER)", answer="SELECT COUNT(*) FROM t", file="f", number=3
)


def row(answer: str = "SELECT 1", *, instruction: str = "How many?", context: str = "", number: int = 1) -> Row:
    return Row(instruction=instruction, context=context, answer=answer, file="f", number=number)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("chat", [CHATML, LLAMA3_LIKE, ZEPHYR_LIKE])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_masked_answer_and_end_are_learned(make_folder: MakeFolder, kind: str, chat: str, name: str) -> None:
    tokenizer = Tokenizer.load(make_folder(kind, {"chat_template": chat}))
    example = make_example(ROW, tokenizer, TEMPLATES[name])
    start = example.num_prompt_tokens
    assert len(example.tokens) == len(example.labels)
    assert example.labels[:start] == [IGNORE] * start
    assert example.labels[start:] == example.tokens[start:]
    assert example.tokens[:start] == row_prompt_tokens(ROW, tokenizer, TEMPLATES[name])
    assert example.tokens[-1] == tokenizer.eos_id
    assert example.tokens[start:].count(tokenizer.eos_id) == 1
    assert ROW.answer in tokenizer.decode(example.tokens[start:])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.text(min_size=1, max_size=20).filter(str.strip), question=st.text(min_size=1, max_size=20))
def test_prompt_ids_do_not_depend_on_the_answer(make_folder: MakeFolder, answer: str, question: str) -> None:
    for kind in ("byte-level", "byte-fallback"):
        tokenizer = Tokenizer.load(make_folder(kind))
        asked = row(answer, instruction=question)
        example = make_example(asked, tokenizer, TEMPLATES["alpaca"])
        assert example.tokens[: example.num_prompt_tokens] == row_prompt_tokens(asked, tokenizer, TEMPLATES["alpaca"])
        assert example.tokens[-1] == tokenizer.eos_id


def test_end_tokens_of_the_generation_config_count(make_folder: MakeFolder) -> None:
    files = {"generation_config.json": {"eos_token_id": [2, 4]}}
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": CHATML}, files=files))
    example = make_example(ROW, tokenizer, TEMPLATES["chat"])
    assert example.tokens[-1] == 4 == tokenizer.encode("<|im_end|>")[0]  # no </s> after it
    assert 2 not in example.tokens


def test_long_rows_are_dropped_and_counted(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    rows = [row(context="t", number=1), row("SELECT " + "a, " * 100, context="t", number=2), row(context="t", number=3)]
    limit = len(make_example(rows[0], tokenizer, TEMPLATES["sql-context"]).tokens)
    made = make_examples(rows, tokenizer, TEMPLATES["sql-context"], max_length=limit)
    assert [example.row.number for example in made.examples] == [1, 3]
    assert [left.number for left in made.too_long] == [2]
    assert (made.stats.num_too_long, made.stats.num_truncated) == (1, 0)
    assert all(example.tokens[-1] == tokenizer.eos_id for example in made.examples)


def test_truncation_cuts_the_start_of_prompts_only(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder("byte-fallback"))
    template = TEMPLATES["sql-context"]
    rows = [row(instruction="long " * 60 + "end", context="t", number=1), row("a, " * 100, context="t", number=2)]
    made = make_examples(rows, tokenizer, template, max_length=50, too_long="truncate")
    whole = make_example(rows[0], tokenizer, template)
    (cut,) = made.examples
    assert (len(cut.tokens), cut.truncated, made.stats.num_truncated, made.stats.num_too_long) == (50, True, 1, 1)
    assert cut.tokens[0] == tokenizer.bos_id
    assert cut.tokens[1:] == whole.tokens[-49:]
    assert [label for label in cut.labels if label != IGNORE] == [label for label in whole.labels if label != IGNORE]
    assert made.preflight.prompts_are_prefixes


def test_figures_are_right(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    made = make_examples([row("x " * n) for n in range(1, 21)], tokenizer, TEMPLATES["alpaca"], max_length=1000)
    lengths = sorted(len(example.tokens) for example in made.examples)
    stats = made.stats
    assert (stats.num_examples, stats.tokens_total, stats.tokens_max) == (20, sum(lengths), lengths[-1])
    assert (stats.tokens_p50, stats.tokens_p95) == (lengths[9], lengths[18])
    assert stats.tokens_mean == pytest.approx(sum(lengths) / 20)
    learned = sum(label != IGNORE for example in made.examples for label in example.labels)
    assert stats.label_tokens_total == learned
    assert stats.label_share == pytest.approx(learned / sum(lengths), abs=1e-4)


def test_preflight_tells_good_from_bad(make_folder: MakeFolder) -> None:
    good = Tokenizer.load(make_folder(settings={"pad_token": "<|im_start|>"}))
    flight = make_examples([ROW], good, TEMPLATES["alpaca"], max_length=1000).preflight
    assert flight.ends_learned
    assert flight.prompts_are_prefixes
    assert flight.answers_round_trip
    assert flight.pad_differs_from_eos is True
    same = Tokenizer.load(make_folder(settings={"pad_token": "</s>"}))
    assert make_examples([ROW], same, TEMPLATES["alpaca"], max_length=1000).preflight.pad_differs_from_eos is False
    none = Tokenizer.load(make_folder())
    assert make_examples([ROW], none, TEMPLATES["alpaca"], max_length=1000).preflight.pad_differs_from_eos is None


def test_nothing_to_learn_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    template = TEMPLATES["alpaca"]
    with pytest.raises(DataError, match="no rows"):
        make_examples([], tokenizer, template, max_length=100)
    with pytest.raises(DataError, match=r"all 1 rows are longer than 10 tokens; got the shortest has \d+"):
        make_examples([ROW], tokenizer, template, max_length=10)
    with pytest.raises(DataError, match=r"all labels are masked in f, row 1"):
        make_examples([row("  ")], tokenizer, template, max_length=1000)
    with pytest.raises(DataError, match="at least 2"):
        make_examples([ROW], tokenizer, template, max_length=1)
    with pytest.raises(DataError, match="drop or truncate"):
        make_examples([ROW], tokenizer, template, max_length=100, too_long="cut")  # type: ignore[arg-type]


def test_tokenizer_without_end_token_is_an_error(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(files={"tokenizer_config.json": {}}))
    with pytest.raises(DataError, match="names no end token"):
        make_examples([ROW], tokenizer, TEMPLATES["alpaca"], max_length=1000)


def test_real_rows_on_a_real_tokenizer_pass_the_preflight(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "models" / "stories260k")
    for name, template in (("sql/wikisql_dev_1k.jsonl", "sql-context"), ("alpaca/alpaca_data_1k.json", "alpaca")):
        rows = read_rows(shared_data / name, limit=200)
        assert pick_template("auto", tokenizer, rows).name == template
        made = make_examples(rows.rows, tokenizer, TEMPLATES[template], max_length=512)
        assert made.preflight.ends_learned
        assert made.preflight.prompts_are_prefixes
        assert made.preflight.answers_round_trip
        assert made.stats.num_examples + made.stats.num_too_long == 200
