"""The columns' HTML: models' texts are shown and never run, and each column says whose answer it is."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser

import faulty_engines
import pytest
from serving_parts import service_over

from burnish.serve.compare_answers import AnswerState
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked, asked_of
from burnish.serve.compare_samples import samples
from burnish.serve.compare_sql import Rows
from burnish.serve.page_columns import columns_html, escape
from burnish.serve.page_parts import examples_html, history_html, notice_html, tables_html

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> ${alert(3)} {{value}} `x` \\ &amp;"


class Seen(HTMLParser):
    """Text and tags of a document, as a browser would have them."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def models(*names: str, digest: str | None = None) -> list[ComparedModel]:
    service = service_over(faulty_engines.plain)
    return [
        ComparedModel(
            name=name,
            model=service.served.models[0],
            service=service,
            digest=digest or hashlib.sha256(name.encode()).hexdigest(),
            template="chat",
        )
        for name in names
    ]


def done(text: str, rows: Rows | None = None) -> AnswerState:
    return AnswerState(
        status="done", text=text, num_tokens=5, prompt_tokens=9, ttft_s=0.0123, answering_s=0.04, rows=rows
    )


@pytest.mark.parametrize("text", [NASTY, "${x}", "{{#each value}}", "</pre>", "\x00\ud7ff"])
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    written = escape(text)
    assert not set("<>${}`\\\"'") & set(written)
    assert Seen(f"<p>{written}</p>").text.replace("\ufffd", "\x00") == text


def test_nothing_that_comes_from_outside_is_run() -> None:
    rows = Rows(columns=(NASTY,), rows=((NASTY, None),), total=1, digest="1")
    failed = AnswerState(status="failed", text=NASTY, error=NASTY)
    states = [done(NASTY, rows), done(f"{NASTY} more", Rows(error=NASTY)), failed]
    asked = Asked(question=NASTY, context=NASTY)
    kept = [{"at": 1.0, "query": "q=" + "%3Cscript%3E", "answers": {}}]
    document = columns_html(models(NASTY, "b", "c"), states, note=NASTY)
    for html in (document, examples_html(asked), tables_html(asked), history_html(kept), notice_html([NASTY])):
        seen = Seen(html)
        assert not {"script", "img"} & set(seen.tags)
        assert not any(name.startswith("on") for name in seen.attributes)
        assert "${" not in html
        assert "{{" not in html
    assert Seen(document).text.count("<script>alert(1)</script>") >= 6


def test_each_column_carries_the_fingerprint_of_its_weights() -> None:
    compared = models("base", "tuned")
    document = columns_html(compared, [done("a"), done("b")])
    for model in compared:
        assert f'data-digest="{model.digest}"' in document
        assert f"<code>{model.model.fingerprint[:12]}</code>" in document  # as the API and burnish.json have it
    assert "The same weights" not in document
    twins = columns_html(models("base", "copy", digest="ab" * 32), [done("a"), done("a")])
    assert "The same weights as base" in twins


def test_differences_are_marked_when_all_are_done() -> None:
    compared = models("base", "tuned")
    texts = ["SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2"]
    document = columns_html(compared, [done(text) for text in texts])
    assert re.findall("<mark>(.*?)</mark>", document) == ["1", "2"]
    streaming = [done(texts[0]), AnswerState(status="answering", text=texts[1])]
    assert "<mark>" not in columns_html(compared, streaming)
    assert "same answer as the first" in columns_html(compared, [done("x"), done("x")])


def test_rows_that_the_first_has_not_are_marked() -> None:
    first = Rows(columns=("n",), rows=(("1",), ("2",)), total=2, right=False, digest="x")
    second = Rows(columns=("n",), rows=(("1",), ("3",)), total=120, right=True, digest="y")
    document = columns_html(models("base", "tuned"), [done("SELECT a, b", first), done("SELECT a", second)])
    assert document.count("<tr class=bn-new>") == 1
    assert "wrong rows" in document
    assert "right rows" in document
    assert "other rows than the first" in document
    assert "120 rows, the first 2 shown" in document


def test_a_query_that_fails_is_not_said_to_have_rows() -> None:
    document = columns_html(models("base"), [done("SELECT", Rows(error="no such table: a", right=False))])
    assert ">does not run<" in document
    assert "wrong rows" not in document


def test_figures_are_those_of_the_answer() -> None:
    document = columns_html(models("base"), [done("SELECT 1")])
    assert "12.3 ms" in document
    assert "<dd>100</dd><dt>tokens/s</dt>" in document
    one = AnswerState(status="done", text="x", num_tokens=1, ttft_s=0.5)
    assert "<dd>–</dd><dt>tokens/s</dt>" in columns_html(models("base"), [one])


def test_examples_and_tables_follow_the_prompt() -> None:
    asked = asked_of(samples()[150])
    assert 'data-example="150" aria-pressed="true"' in examples_html(asked)
    assert "sample database" in tables_html(asked)
    assert "are empty" in tables_html(Asked(question="x", context="CREATE TABLE a (b INTEGER)"))
    assert "not run" in tables_html(Asked(question="x"))


def test_rows_are_not_marked_where_the_first_shows_only_some_of_its_own() -> None:
    first = Rows(columns=("n",), rows=(("1",), ("2",)), total=60, digest="x")
    second = Rows(columns=("n",), rows=(("1",), ("3",)), total=2, digest="y")
    states = [done("SELECT a, b", first), done("SELECT a", second)]
    assert "bn-new" not in columns_html(models("base", "tuned"), states)
