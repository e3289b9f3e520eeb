"""The page needs nothing but itself, escapes what it shows, and is the same every time."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from burnish.measure.report import RunRecord, Sample, SampleAnswer, Stage, Variant
from burnish.measure.report_html import mark_differences, render_html
from burnish.measure.report_plots import draw_plots

VOID = {"meta", "link", "br", "use", "path", "img", "rect"}


class Page(HTMLParser):
    """Every start tag with its attributes, the text, and a check that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_asks_for_nothing_outside_itself(full_run: RunRecord) -> None:
    text = render_html(full_run)
    assert re.search(r"https?:|//[a-z]|@import|url\((?!#)", text) is None
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith("#") or target == "data:,"
        assert not any(name.startswith("on") for name in attributes)


def test_page_shows_every_part(full_run: RunRecord) -> None:
    page = Page(render_html(full_run))
    for words in ("All 3 gates passed", "gptq-4bit", "87.3 %", "0.0042", "1.07×", "548 MiB", "float32", "A processor"):
        assert words in page.words
    assert "21 November 2026, 09:14 UTC" in page.words
    assert "SELECT name FROM ship WHERE built > 1990" in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


HOSTILE = (
    "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)> {{ 7 * 7 }} $\\frac$ & \"quotes\""
)


def test_hostile_text_is_shown_and_never_run() -> None:
    run = RunRecord(
        name=HOSTILE,
        created=HOSTILE,
        model=HOSTILE,
        task=HOSTILE,
        metric=HOSTILE,
        hardware={"cpu": HOSTILE},
        versions={HOSTILE: HOSTILE},
        variants=[
            Variant(name=HOSTILE, description=HOSTILE, disk_bytes=10, score=0.5, verdict=HOSTILE, reasons=[HOSTILE]),
            Variant(name="b", parent=HOSTILE, disk_bytes=5, score=0.4, verdict="fail"),
        ],
        stages=[Stage(name=HOSTILE, seconds=1, measured_peak_bytes=10, components={HOSTILE: 3}, note=HOSTILE)],
        samples=[
            Sample(
                question=HOSTILE,
                gold=HOSTILE,
                context=HOSTILE,
                answers={
                    HOSTILE: SampleAnswer(text=HOSTILE + "!", right=False, error=HOSTILE),
                    "c": SampleAnswer(text=HOSTILE, right=True),
                },
            )
        ],
        settings={HOSTILE: {HOSTILE: [HOSTILE]}, "loose": HOSTILE},
    )
    page = Page(render_html(run))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.words.count("alert('x')") > 10
    assert "{{ 7 * 7 }}" in page.words
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_same_record_gives_the_same_bytes(full_run: RunRecord) -> None:
    assert render_html(full_run) == render_html(full_run)


def test_ids_are_unique_and_every_reference_has_its_target(full_run: RunRecord) -> None:
    text = render_html(full_run)
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    wanted |= {
        (attributes["href"] or "")[1:] for _, attributes in page.tags if (attributes.get("href") or "")[:1] == "#"
    }
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)


def test_tables_name_their_headers(full_run: RunRecord) -> None:
    page = Page(render_html(full_run))
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert len(headers) > 20
    assert all(attributes.get("scope") in ("col", "row", "colgroup", "rowgroup") for attributes in headers)


def test_plots_follow_the_page_and_say_what_they_show(full_run: RunRecord) -> None:
    plots = draw_plots(full_run)
    assert [plot.name for plot in plots] == ["quality-size", "quality-speed", "memory", "loss"]
    for plot in plots:
        assert "var(--accent)" in plot.svg
        assert re.search(r"#0102|DejaVu|<style|xmlns|<metadata", plot.svg) is None
        assert 'role="img"' in plot.svg
    assert "tuned 87.3 % at 11.9 MiB" in plots[0].description
    assert "tune 548 MiB measured, 512 MiB predicted" in plots[2].description
    for name in ("base", "tuned", "merged", "gptq-8bit", "gptq-4bit"):
        assert f">{name}</text>" in plots[0].svg


@pytest.mark.parametrize(("size", "unit", "label"), [(1536 * 1024**2, "MiB", "1,536"), (28 * 1024**3, "GiB", "28.0")])
def test_memory_bars_are_labelled_in_the_unit_of_their_axis(size: int, unit: str, label: str) -> None:
    run = RunRecord(name="x", created="y", stages=[Stage(name="tune", measured_peak_bytes=size)])
    svg = draw_plots(run)[0].svg
    assert f">peak memory, {unit}</text>" in svg
    assert f">{label}</text>" in svg


@pytest.mark.parametrize("count", [0, 1])
def test_a_plot_without_two_points_is_left_out(full_run: RunRecord, count: int) -> None:
    run = replace(full_run, variants=full_run.variants[:count], stages=[], loss=full_run.loss[:count])
    assert draw_plots(run) == []


def test_many_variants_at_one_place_still_have_their_names(full_run: RunRecord) -> None:
    same = [replace(full_run.variants[1], name=f"variant-{number}") for number in range(8)]
    plot = draw_plots(replace(full_run, variants=same))[0]
    assert all(f">variant-{number}</text>" in plot.svg for number in range(8))


def test_a_wrong_answer_is_marked_where_it_differs() -> None:
    gold = "SELECT Title FROM book WHERE Writer <> 'Dennis Lee'"
    marked = mark_differences(gold, "SELECT Title FROM book WHERE Writer = 'Not Dennis Lee'")
    assert marked == ("SELECT Title FROM book WHERE Writer <mark>=</mark> <mark>&#39;Not Dennis Lee&#39;</mark>")
    assert mark_differences(gold, "<b>port</b>") == "&lt;b&gt;port&lt;/b&gt;"
