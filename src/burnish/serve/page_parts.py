"""The page's other pieces as HTML: the head, the examples, the tables, the history."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from burnish.serve.compare_history import entries, read_entry
from burnish.serve.compare_prompt import Asked
from burnish.serve.compare_samples import SHOWN, Sample, samples
from burnish.serve.page_columns import escape

_PREVIEW_ROWS = 4


def head_html() -> str:
    """Name and the switch between light and dark."""
    return (
        '<div class="bn-head"><h1><b>burnish</b> compare</h1>'
        '<button type="button" data-theme-switch title="Light or dark" aria-label="Switch between light and dark">'
        '<svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true"><circle cx="12" cy="12" r="8.5" '
        'fill="none" stroke="currentColor" stroke-width="1.8"/>'
        '<path d="M12 3.5a8.5 8.5 0 0 1 0 17z" fill="currentColor"/></svg>'
        "</button></div>"
    )


def examples_html(asked: Asked) -> str:
    """Questions of the bundled task; the one that is asked now is marked."""
    shown = [samples()[number] for number in SHOWN]
    now = asked.reference
    if now is not None and now.number not in SHOWN:
        shown.append(now)
    chips = "".join(_chip(sample, sample is now) for sample in shown)
    return f'<div class="bn-examples"><span>Examples</span>{chips}<button data-example="another">Another</button></div>'


def _chip(sample: Sample, now: bool) -> str:
    pressed = "true" if now else "false"
    return f'<button data-example="{sample.number}" aria-pressed="{pressed}">{escape(sample.question)}</button>'


def tables_html(asked: Asked) -> str:
    """What SQL would be run on: some rows of every table."""
    sample = asked.of_sample
    if sample is None:
        if asked.database is None:
            return '<p class="bn-hint">Without CREATE TABLE statements answers are not run as SQL.</p>'
        return '<p class="bn-hint">Answers are run as SQL on these tables, which are empty.</p>'
    return (
        '<p class="bn-hint">Answers are run as SQL on this sample database: read-only, at most 2 s.</p>'
        + f'<div class="bn-tables">{"".join(_table(name, *some) for name, some in _some_rows(sample).items())}</div>'
    )


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], total: int) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<figure><figcaption>{escape(name)} <span>{len(rows)} of {total} rows</span></figcaption><div class="bn-rows" '
        f'tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>'
    )


def _some_rows(sample: Sample) -> dict[str, tuple[list[str], list[tuple[Any, ...]], int]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(sample.database)  # ours, made by the bundled task
        found = {}
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            cursor = connection.execute(f'SELECT * FROM "{name}"')
            rows = cursor.fetchall()
            found[name] = ([column[0] for column in cursor.description], rows[:_PREVIEW_ROWS], len(rows))
        return found
    finally:
        connection.close()


def history_html(kept: Any) -> str:
    """What was asked before, newest first."""
    shown = []
    for place, each in enumerate(entries(kept)):
        remembered = read_entry(each)
        if remembered is None:
            continue
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(remembered.at))
        question = " ".join(remembered.asked.question.split()) or "(no question)"
        question = question if len(question) <= 160 else f"{question[:160]}…"
        shown.append(
            f'<li><button data-entry="{place}"><span>{escape(question)}</span>'
            f'<time datetime="{at}">{at[11:16]} UTC</time></button></li>'
        )
    if not shown:
        return '<p class="bn-hint">What you ask is listed here, kept in this browser alone.</p>'
    return f'<ol class="bn-history">{"".join(shown)}</ol><button class="bn-clear" data-entry="clear">Clear</button>'


def notice_html(lines: Sequence[str]) -> str:
    """What went wrong with the form or the link; nothing for no lines."""
    if not lines:
        return ""
    return '<div class="bn-notice" role="alert">' + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</div>"
