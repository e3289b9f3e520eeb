"""The answers as HTML: one column a model. Every text from outside goes through `escape`."""

from __future__ import annotations

import html
from collections.abc import Sequence

import psutil

from burnish.measure.formatting import format_bytes, format_milliseconds, format_rate
from burnish.serve.compare_answers import AnswerState
from burnish.serve.compare_differences import Segment, mark_differences, share_enough
from burnish.serve.compare_models import ComparedModel, Memory
from burnish.serve.compare_sql import Rows

# Gradio's HTML component fills templates in: besides HTML's own characters, those of templates are written as numbers.
_TEMPLATE_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "${}`\\"}
_STATUS = {
    "idle": "",
    "loading": "is being loaded",
    "waiting": "waits for its turn",
    "reading": "reads the prompt",
    "answering": "answers",
    "querying": "runs the query",
    "done": "",
    "stopped": "stopped",
    "failed": "failed",
}


def escape(text: str) -> str:
    """Text as HTML that shows exactly this text."""
    return html.escape(text, quote=True).translate(_TEMPLATE_SIGNS)


def columns_html(models: Sequence[ComparedModel], states: Sequence[AnswerState], *, note: str = "") -> str:
    """All columns.

    Args:
        states: one for each model; those of models that were not asked are idle.
        note: one line above them.
    """
    over = all(not state.running for state in states)
    texts = [state.text if state.status in ("done", "stopped") else None for state in states]
    segments = mark_differences(texts) if over and texts[0] is not None else None
    largest = max((memory.total_bytes for model in models if (memory := model.memory())), default=0)
    parts = [f'<p class="bn-note">{escape(note)}</p>' if note else ""]
    parts.append(f'<div class="bn-columns" style="--bn-count:{len(models)}">')
    for place, (model, state) in enumerate(zip(models, states)):
        parts.append(
            _column(
                model,
                state,
                segments=None if segments is None else segments[place],
                beside=states[0] if place and over else None,
                twin=_twin(models, place),
                largest=largest,
            )
        )
    parts.append(f"</div>{_machine(models)}")
    return "".join(parts)


def _column(
    model: ComparedModel,
    state: AnswerState,
    *,
    segments: Sequence[Segment] | None,
    beside: AnswerState | None,
    twin: str | None,
    largest: int,
) -> str:
    status = _STATUS[state.status]
    busy = " bn-busy" if state.running else ""
    about = escape(model.about())
    return (
        f'<article class="bn-column{busy}" data-digest="{escape(model.digest)}" data-status="{state.status}">'
        f'<header><h2>{escape(model.name)}</h2><span class="bn-status">{status}</span></header>'
        f'<p class="bn-print" title="Fingerprint, as burnish.json and the API have it: '
        f"{escape(model.model.fingerprint)}&#10;"
        f'SHA-256 of all weights, which the colours show: {escape(model.digest)}">{_swatch(model.digest)}'
        f"<code>{escape(model.fingerprint)}</code>"
        + (f'<span class="bn-about">{about}</span>' if about else "")
        + "</p>"
        + (f'<p class="bn-warning">The same weights as {escape(twin)}.</p>' if twin else "")
        + _answer(model, state, segments)
        + _chips(state, beside)
        + _rows(state.rows, None if beside is None else beside.rows)
        + _figures(state)
        + _memory(model.memory(), state, largest)
        + "</article>"
    )


def _twin(models: Sequence[ComparedModel], place: int) -> str | None:
    return next((other.name for other in models[:place] if other.digest == models[place].digest), None)


def _swatch(digest: str) -> str:
    """Six colours made of the digest: other weights look otherwise at a glance."""
    hues = [int(digest[start : start + 2], 16) * 360 // 256 for start in range(0, 12, 2)]
    return (
        '<span class="bn-swatch" aria-hidden="true">'
        + "".join(f'<i style="--h:{hue}"></i>' for hue in hues)
        + "</span>"
    )


def _answer(model: ComparedModel, state: AnswerState, segments: Sequence[Segment] | None) -> str:
    if state.error is not None:
        before = f'<pre class="bn-answer">{escape(state.text)}</pre>' if state.text else ""
        return f'{before}<p class="bn-error" role="alert">{escape(state.error)}</p>'
    if state.status == "idle":
        trouble = model.trouble
        said = "No answer yet." if trouble is None else trouble
        return f'<pre class="bn-answer bn-empty">{escape(said)}</pre>'
    if not state.text and not state.running:
        return '<pre class="bn-answer bn-empty">The answer is empty.</pre>'
    caret = '<span class="bn-caret"></span>' if state.running and state.status != "querying" else ""
    if segments is None:
        return f'<pre class="bn-answer">{escape(state.text)}{caret}</pre>'
    marked = "".join(
        f"<mark>{escape(piece.text)}</mark>" if piece.differs else escape(piece.text) for piece in segments
    )
    return f'<pre class="bn-answer">{marked}</pre>'


def _chips(state: AnswerState, beside: AnswerState | None) -> str:
    chips = []
    if state.rows is not None and state.rows.right is not None:
        wrong = "wrong rows" if state.rows.error is None else "does not run"
        chips.append(("good", "right rows") if state.rows.right else ("bad", wrong))
    if beside is not None and state.status == "done" and beside.status == "done":
        if state.text == beside.text:
            chips.append(("plain", "same answer as the first"))
        elif not share_enough(beside.text, state.text):
            chips.append(("plain", "another answer altogether"))
        elif state.rows is not None and beside.rows is not None and state.rows.digest and beside.rows.digest:
            same = state.rows.digest == beside.rows.digest
            chips.append(("plain", "same rows as the first" if same else "other rows than the first"))
    if state.finish_reason == "length":
        chips.append(("warn", "cut at its longest"))
    if not chips:
        return ""
    return '<p class="bn-chips">' + "".join(f'<span class="bn-{kind}">{text}</span>' for kind, text in chips) + "</p>"


def _rows(rows: Rows | None, beside: Rows | None) -> str:
    if rows is None:
        return ""
    if rows.error is not None:
        return f'<p class="bn-error bn-sql-error">The query does not run: {escape(rows.error)}</p>'
    # Of a first column that shows only some of its rows nobody knows what else it has.
    known = None
    if beside is not None and beside.error is None and beside.total == len(beside.rows):
        known = set(beside.rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in rows.columns)
    body = "".join(
        f"<tr{' class=bn-new' if known is not None and row not in known else ''}>"
        + "".join("<td><i>NULL</i></td>" if cell is None else f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows.rows
    )
    count = "no rows" if not rows.total else "1 row" if rows.total == 1 else f"{rows.total:,} rows"
    if rows.total > len(rows.rows):
        count += f", the first {len(rows.rows)} shown"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="bn-rows" tabindex="0">{table}</div><p class="bn-count">{count}</p>'


def _figures(state: AnswerState) -> str:
    ttft = format_milliseconds(None if state.ttft_s is None else state.ttft_s * 1e3)
    figures = [
        ("TTFT", ttft, "Time from asking to the first token"),
        ("tokens/s", format_rate(state.tokens_per_s), "Tokens after the first one, over their time"),
        ("answer tokens", _count(state.num_tokens), "Tokens of the answer, its end token included"),
        ("prompt tokens", _count(state.prompt_tokens), "Tokens of the prompt"),
    ]
    cells = "".join(
        f'<div title="{escape(hint)}"><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>'
        for name, value, hint in figures
    )
    return f'<dl class="bn-figures">{cells}</dl>'


def _count(tokens: int) -> str:
    return str(tokens) if tokens else "–"


def _memory(memory: Memory | None, state: AnswerState, largest: int) -> str:
    if memory is None or not largest:
        return ""
    used = max(state.kv_used_bytes, memory.kv_used_bytes if state.running else 0)
    parts = [("weights", memory.weights_bytes), ("used", used), ("left", max(0, memory.kv_bytes - used))]
    bar = "".join(f'<i class="bn-{name}" style="width:{100 * size / largest:.2f}%"></i>' for name, size in parts)
    words = {"weights": "weights", "used": "KV in use", "left": "KV free"}
    legend = "".join(
        f'<span><i class="bn-{name}"></i>{words[name]} {escape(format_bytes(size))}</span>' for name, size in parts
    )
    return f'<div class="bn-memory"><div class="bn-bar" aria-hidden="true">{bar}</div><p>{legend}</p></div>'


def _machine(models: Sequence[ComparedModel]) -> str:
    """What the engines take together, and what is left of the machine's memory."""
    engines = {id(model.service): memory for model in models if (memory := model.memory()) is not None}
    if not engines:
        return ""
    taken = sum(memory.total_bytes for memory in engines.values())
    machine = psutil.virtual_memory()
    one = "1 engine" if len(engines) == 1 else f"{len(engines)} engines"
    return (
        f'<p class="bn-machine">{one}, {format_bytes(taken)} of weights and cache · '
        f"{format_bytes(machine.available)} of this machine's {format_bytes(machine.total)} free</p>"
    )
