"""The record round-trips strictly; every format shows every variant, and nothing breaks where a figure is missing."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.errors import ConfigError, DataError
from burnish.measure.formatting import MISSING
from burnish.measure.report import (
    FORMATS,
    RunRecord,
    Stage,
    Variant,
    build_report,
    combine_runs,
    headline,
    read_run,
    render,
)

VARIANT_FIELDS = [
    "name",
    "disk_bytes",
    "peak_memory_bytes",
    "ttft_ms",
    "output_tokens_per_s_1",
    "output_tokens_per_s_8",
    "score",
    "score_low",
    "score_high",
    "kl_to_parent",
    "verdict",
]


def test_json_report_has_exactly_the_promised_fields(full_run: RunRecord) -> None:
    report = json.loads(render(full_run, format="json"))
    assert list(report) == ["variants", "stages"]
    assert [list(variant) for variant in report["variants"]] == [VARIANT_FIELDS] * 5
    assert [list(stage) for stage in report["stages"]] == [
        ["name", "seconds", "predicted_peak_bytes", "measured_peak_bytes"]
    ] * 2
    assert [variant["name"] for variant in report["variants"]] == ["base", "tuned", "merged", "gptq-8bit", "gptq-4bit"]
    assert report["variants"][1]["score"] == 0.873
    assert build_report(full_run.to_dict()) == report


def test_record_round_trips_through_json(full_run: RunRecord, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(full_run.to_dict()), encoding="utf-8")
    assert read_run(tmp_path) == full_run
    assert read_run(tmp_path / "run.json") == full_run


def test_nan_becomes_null_because_json_has_no_word_for_it() -> None:
    run = RunRecord(name="x", created="now", variants=[Variant(name="a", kl_to_parent=math.nan, score=math.inf)])
    report = json.loads(render(run, format="json"), parse_constant=lambda word: pytest.fail(word))
    assert report["variants"][0]["kl_to_parent"] is None
    assert report["variants"][0]["score"] is None


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"name": "x", "created": "y", "variants": [{"name": "a", "scor": 1}]}, r"variants\.0\.scor.*mean score\?"),
        ({"name": "x", "created": "y", "stages": [{"name": "a", "seconds": "soon"}]}, r"stages\.0\.seconds.*'soon'"),
        ({"created": "y"}, "has no name"),
        ({"name": "x", "created": "y", "schema": 99}, "schema 99"),
        ([], "wrong value"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_its_key(record: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        RunRecord.from_dict(record, source="run.json")  # type: ignore[arg-type]


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run at"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"run\.json is not JSON"):
        read_run(tmp_path)


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_its_width_and_is_whole(full_run: RunRecord, width: int) -> None:
    text = render(full_run, format="table", width=width)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= width
    assert "…" not in text
    row = next(line for line in lines if line.startswith("gptq-4bit "))
    assert row.split() == [
        "gptq-4bit",
        "3.9",
        "400",
        "9.70",
        "188",
        "906",
        "85.3",
        "81.3–89.3",
        "0.0042",
        "99.1",
        "pass",
    ]
    assert "All 3 gates passed" in text
    assert any(line.startswith("tune") and line.endswith("1.07×") for line in lines)


def test_table_has_colour_only_when_asked(full_run: RunRecord) -> None:
    assert "\x1b[" not in render(full_run, format="table")
    assert "\x1b[" in render(full_run, format="table", color=True)


def test_brackets_in_names_are_text_not_markup() -> None:
    run = RunRecord(name="[red]x[/red]", created="y", variants=[Variant(name="[bold]a[/bold]")])
    assert "[bold]a[/bold]" in render(run, format="table", width=120)
    assert "[red]x[/red]" in render(run, format="table", width=120)


def test_csv_has_plain_numbers_and_empty_cells(full_run: RunRecord) -> None:
    rows = list(csv.DictReader(io.StringIO(render(full_run, format="csv"))))
    assert list(rows[0]) == VARIANT_FIELDS
    assert float(rows[1]["score"]) == 0.873
    assert rows[0]["verdict"] == ""


def test_markdown_has_one_row_per_variant_and_escapes_pipes(full_run: RunRecord) -> None:
    text = render(replace(full_run, variants=[Variant(name="a|b"), *full_run.variants]), format="md")
    assert "| a\\|b | – |" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 6 + 2 + 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "run",
    [
        RunRecord(name="empty", created=""),
        RunRecord(name="bare", created="?", variants=[Variant(name="base")], stages=[Stage(name="tune")]),
        RunRecord(
            name="zeros",
            created="2026-11-21",
            variants=[
                Variant(name="base", disk_bytes=0, score=0.0, score_low=0.0, score_high=0.0, output_tokens_per_s_1=0.0),
                Variant(name="tuned", parent="gone", disk_bytes=0, score=0.0, verdict="pass", output_tokens_per_s_1=0),
            ],
            stages=[Stage(name="tune", seconds=0, predicted_peak_bytes=0, measured_peak_bytes=0)],
        ),
    ],
    ids=lambda run: run.name,
)
def test_every_format_survives_missing_figures(run: RunRecord, format: str) -> None:
    text = render(run, format=format)
    assert text.endswith("\n")
    if run.name == "bare" and format in ("table", "md", "html"):
        assert MISSING in text


def test_an_unknown_format_lists_the_known_ones(full_run: RunRecord) -> None:
    with pytest.raises(ConfigError, match="table, md, csv, json, html"):
        render(full_run, format="pdf")


def test_headline_says_what_happened_and_counts_points(full_run: RunRecord) -> None:
    said = headline(full_run)
    assert (said.verdict, said.title) == ("pass", "All 3 gates passed")
    assert said.sentences == (
        "Tuning raised execution accuracy from 6.0 % to 87.3 %.",
        "gptq-4bit is 2.67× smaller on disk than merged and loses 2.0 points.",
    )


def test_headline_names_what_failed_before_anything_else(full_run: RunRecord) -> None:
    worse = replace(full_run.variants[4], verdict="fail", reasons=["mean KL is 0.9, more than 0.05"])
    run = replace(full_run, variants=[*full_run.variants[:4], worse])
    said = headline(run)
    assert (said.verdict, said.title) == ("fail", "gptq-4bit failed its gate")
    assert "gptq-8bit is 1.70× smaller" in said.sentences[1]
    assert "mean KL is 0.9" in render(run, format="table")
    stopped = replace(run, stages=[Stage(name="merge", status="failed")])
    assert headline(stopped).title == "Stopped at merge"
    assert headline(RunRecord(name="x", created="y")).verdict == "none"


def test_several_runs_stand_side_by_side(full_run: RunRecord) -> None:
    later = replace(full_run, created="2026-11-22T09:00:00+00:00", seconds=1.0)
    both = combine_runs([full_run, later])
    assert len(both.variants) == 10
    assert both.variants[4].name == "demo/gptq-4bit"
    assert both.variants[9].name == "demo~2/gptq-4bit"
    assert both.variants[9].parent == "demo~2/merged"
    assert next(iter(both.samples[0].answers)) == "demo~2/base"
    assert combine_runs([full_run]) is full_run
    with pytest.raises(ConfigError):
        combine_runs([])
