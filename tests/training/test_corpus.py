"""The base model's corpus: none of the task's tables and columns, no answered question, the same for a seed."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "training/base_model"


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(FOLDER))
    try:
        import corpus as module
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def documents(corpus) -> list[str]:
    plain = itertools.islice(corpus.documents(7), 150)
    asked = itertools.islice(corpus.documents(7, question_share=0.5, wide=True), 250)
    return [*plain, *asked]


def test_corpus_has_no_table_and_no_column_of_the_task(corpus, documents: list[str]) -> None:
    for text in documents:
        for table, body in re.findall(r"CREATE TABLE (\w+) \((.*)\);", text):
            columns = {part.split()[0] for part in body.split(", ")}
            assert table not in corpus.TASK_TABLES
            assert not columns & corpus.TASK_COLUMNS


def test_questions_are_never_answered_and_the_chat_form_never_occurs(documents: list[str]) -> None:
    asked = [
        text
        for text in documents
        if re.search(r"^\W*\d*\W*(Can you show|Give me|Which|Please return|Tell me)", text, re.M)
    ]
    assert len(asked) > 40
    for text in documents:
        assert "<|" not in text
    for text in asked:
        assert "SELECT" not in text


def test_scripts_run_in_sqlite(documents: list[str]) -> None:
    import sqlite3

    scripts = [text for text in documents if "SELECT" in text]
    assert scripts
    for text in scripts:
        connection = sqlite3.connect(":memory:")
        for line in text.splitlines():
            if line.startswith(("CREATE", "SELECT")):
                connection.execute(line)
        connection.close()


def test_same_seed_gives_the_same_text(corpus) -> None:
    first = list(itertools.islice(corpus.documents(1), 20))
    assert first == list(itertools.islice(corpus.documents(1), 20))
    assert first != list(itertools.islice(corpus.documents(2), 20))


def test_bundled_tokenizer_round_trips_the_corpus_and_any_bytes(documents: list[str]) -> None:
    tokenizer = Tokenizer.load(bundled_path("burnish-sql-base"))
    for text in [*documents[:60], "naïve café — 東京 🙂\t\r\n\x00 end"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
