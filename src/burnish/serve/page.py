"""The page that compares models: one prompt, answers side by side. What stands in it is made by `page_columns`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base

from burnish.errors import BurnishError, RequestError
from burnish.measure.sql_text import statement_in
from burnish.serve.compare_answers import AnswerState, ask
from burnish.serve.compare_history import entries, read_entry, remember
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked, asked_of, from_query, to_query
from burnish.serve.compare_samples import NUM_SAMPLES, SHOWN, sample_of
from burnish.serve.compare_sql import Query, SqlRunner
from burnish.serve.page_columns import columns_html
from burnish.serve.page_parts import examples_html, head_html, history_html, notice_html, tables_html

_HERE = Path(__file__).parent
STYLE = _HERE / "page.css"
SCRIPT = _HERE / "page.js"
_AT_ONCE = 8
_WAITING = 32
_POLL_S = 1.0
_LINE_CHARS = 160
_SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
# Buttons inside our own HTML tell which of them was pressed.
_PRESSED = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-%(name)s]');
  if (button) trigger('click', {pressed: button.dataset.%(name)s});
});
"""


def theme() -> Base:
    """Fonts of the machine, so that nothing is fetched; colours are in the style sheet."""
    return Base(font=list(_SYSTEM), font_mono=list(_MONO))


class Page:
    """Handlers of the page's events, and the components that they are about.

    Args:
        models: the first is what the others are held against.
        sql: runs answers.
    """

    def __init__(self, models: Sequence[ComparedModel], sql: SqlRunner) -> None:
        self._models = tuple(models)
        self._sql = sql
        self._running: dict[str, asyncio.Event] = {}

    def build(self) -> gr.Blocks:
        """The components and what they do."""
        with gr.Blocks(title="burnish compare", analytics_enabled=False, fill_width=True) as blocks:
            _shown(head_html())
            kept = gr.BrowserState([], storage_key="burnish-compare", secret="burnish")
            sample = gr.State(None)
            with gr.Column(elem_id="bn-ask"):
                examples = _shown(pressed="example")
                question = gr.Textbox(label="Prompt", lines=1, max_lines=10, elem_id="bn-question", placeholder="Ask…")
                with gr.Accordion("Tables and other context", open=False, elem_id="bn-context"):
                    context = gr.Textbox(label="Put before the prompt", lines=2, max_lines=14, elem_id="bn-tables")
                    tables = _shown()
                with gr.Accordion("Settings", open=False, elem_id="bn-settings"), gr.Row():
                    numbers = [
                        gr.Number(label="Longest answer, tokens", value=128, precision=0, minimum=1, min_width=120),
                        gr.Number(label="Temperature, 0 is greedy", value=0, step=0.1, minimum=0, min_width=120),
                        gr.Number(label="Top-p", value=1, step=0.05, minimum=0, maximum=1, min_width=120),
                        gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120),
                    ]
                    in_turn = gr.Checkbox(label="One model after another", min_width=160)
                with gr.Row(elem_id="bn-actions"):
                    go = gr.Button("Compare", variant="primary", elem_id="bn-go", scale=0)
                    stop = gr.Button("Stop", elem_id="bn-stop", interactive=False, scale=0)
                    link = gr.Button("Copy link", elem_id="bn-link", scale=0)
            notice = _shown()
            answers = _shown()
            _shown('<h2 class="bn-title">History</h2>')
            history = _shown(pressed="entry")
            query = gr.Textbox(visible=False)

            form = [question, context, sample, *numbers, in_turn]
            around = [examples, tables]
            quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
            blocks.load(self._open, [kept], [*form, *around, notice, history], **quiet).then(
                self._until_loaded, None, [answers], **quiet, concurrency_limit=None
            )
            asking: Any = {
                "fn": self._ask,
                "inputs": [*form, kept],
                "outputs": [answers, notice, go, stop, kept, history, query],
                "concurrency_limit": _AT_ONCE,
                "trigger_mode": "once",
            }
            for trigger in (go.click, question.submit):
                trigger(**asking, **quiet).then(None, [query], None, js="query => burnish.show(query)", **quiet)
            stop.click(self._stop, None, None, concurrency_limit=None, **quiet)
            link.click(self._link, form, [query, notice], **quiet).then(
                None, [query], None, js="query => burnish.copy(query)", **quiet
            )
            examples.click(self._take_example, [sample], [*form[:3], *around], **quiet)
            context.change(self._look_at, [question, context, sample], around, trigger_mode="always_last", **quiet)
            history.click(self._take_entry, [kept], [*form, *around, answers, kept, history, notice], **quiet)
            blocks.unload(self._leave)
        blocks.queue(default_concurrency_limit=_AT_ONCE, max_size=_WAITING)
        return blocks

    def _idle(self) -> list[AnswerState]:
        return [AnswerState() for _ in self._models]

    def _open(self, kept: Any, request: gr.Request) -> list[Any]:
        """Fill in what the link says, or the first example."""
        asked, complaints = from_query(dict(request.query_params))
        if not asked.question and not asked.context:
            first = sample_of(SHOWN[0])
            assert first is not None
            asked = _with_settings(asked_of(first), asked)
        return [*_fields(asked), *_around(asked), notice_html(complaints), history_html(kept)]

    async def _until_loaded(self, request: gr.Request) -> AsyncIterator[Any]:
        """Empty columns, again until every engine was loaded or given up."""
        while str(request.session_hash) not in self._running:
            waits = any(model.state in ("starting", "restarting") for model in self._models)
            yield columns_html(self._models, self._idle())
            if not waits:
                return
            await asyncio.sleep(_POLL_S)

    async def _ask(self, request: gr.Request, *given: Any) -> AsyncIterator[list[Any]]:
        """Stream the answers. Whatever ends this takes the requests from the engines."""
        *fields, kept = given
        session, skip = str(request.session_hash), gr.skip()
        waiting, resting = gr.update(interactive=False), gr.update(interactive=True)
        try:
            asked = _asked(fields)
            if not asked.question.strip():
                raise RequestError("there is nothing to ask", expected="a prompt")
        except BurnishError as error:
            yield [skip, notice_html([error.message]), resting, waiting, skip, skip, skip]
            return
        stop = self._running[session] = asyncio.Event()
        states: list[AnswerState] = []
        answers = ask(self._models, asked, sql=self._sql, stop=stop)
        try:
            yield [skip, "", waiting, resting, skip, skip, skip]
            async for states in answers:
                yield [columns_html(self._models, states, note=_line(asked)), skip, skip, skip, skip, skip, skip]
        finally:
            await answers.aclose()  # type: ignore[attr-defined]
        kept = remember(kept, asked, self._models, states)
        yield [skip, skip, resting, waiting, kept, history_html(kept), _query_or_nothing(asked)]

    def _stop(self, request: gr.Request) -> None:
        stop = self._running.get(str(request.session_hash))
        if stop is not None:
            stop.set()

    def _leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self._stop(request)
        self._running.pop(str(request.session_hash), None)

    def _link(self, *given: Any) -> list[Any]:
        try:
            return [to_query(_asked(given)), ""]
        except BurnishError as error:
            return ["", notice_html([error.message])]

    def _take_example(self, now: Any, event: gr.EventData) -> list[Any]:
        pressed = str(event.pressed)
        number = int(pressed) if pressed.isdecimal() else ((now if isinstance(now, int) else -1) + 1) % NUM_SAMPLES
        sample = sample_of(number)
        assert sample is not None
        asked = asked_of(sample)
        return [asked.question, asked.context, asked.sample, *_around(asked)]

    def _look_at(self, question: Any, context: Any, sample: Any) -> list[str]:
        try:
            return _around(Asked(question=question or "", context=context or "", sample=sample))
        except BurnishError:
            return ["", ""]

    async def _take_entry(self, kept: Any, event: gr.EventData) -> list[Any]:
        """Bring a prompt back with the answers it got; SQL is run again."""
        skip, pressed, known = gr.skip(), str(event.pressed), entries(kept)
        if pressed == "clear":
            return [*[skip] * 10, skip, [], history_html([]), ""]
        remembered = read_entry(known[int(pressed)]) if pressed.isdecimal() and int(pressed) < len(known) else None
        if remembered is None:
            return [*[skip] * 10, skip, skip, history_html(kept), notice_html(["This entry is not there any more."])]
        asked, states = remembered.asked, []
        reference = asked.reference
        for model in self._models:
            state = remembered.answers.get(model.digest) or AnswerState()
            if state.status == "done" and asked.database is not None:
                answer, ordered = (None, False) if reference is None else (reference.answer, reference.ordered)
                state.rows = await self._sql.run(Query(asked.database, statement_in(state.text), answer, ordered))
            states.append(state)
        html = columns_html(self._models, states, note=f"From the history: {_line(asked)}")
        return [*_fields(asked), *_around(asked), html, skip, skip, ""]


def _shown(html: str = "", *, pressed: str | None = None) -> gr.HTML:
    """Our own HTML; buttons in it that carry data-`pressed` tell when they are pressed."""
    script = None if pressed is None else _PRESSED % {"name": pressed}
    return gr.HTML(html, js_on_load=script, apply_default_css=False)


def _asked(fields: Sequence[Any]) -> Asked:
    """The form's fields as a value.

    Raises:
        RequestError: one is out of its range, or empty.
    """
    question, context, sample, max_tokens, temperature, top_p, seed, in_turn = fields
    for name, number in (("tokens", max_tokens), ("temperature", temperature), ("top_p", top_p), ("seed", seed)):
        if number is None:
            raise RequestError(f"{name} is empty", expected="a number")
    return Asked(
        question=question or "",
        context=context or "",
        sample=sample,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        in_turn=in_turn,
    )


def _fields(asked: Asked) -> list[Any]:
    return [
        asked.question,
        asked.context,
        asked.sample,
        asked.max_tokens,
        asked.temperature,
        asked.top_p,
        asked.seed,
        asked.in_turn,
    ]


def _around(asked: Asked) -> list[str]:
    return [examples_html(asked), tables_html(asked)]


def _with_settings(asked: Asked, settings: Asked) -> Asked:
    return _asked([*_fields(asked)[:3], *_fields(settings)[3:]])


def _line(asked: Asked) -> str:
    """The question as one line, so that answers never stand beside another one unnoticed."""
    text = " ".join(asked.question.split())
    return text if len(text) <= _LINE_CHARS else f"{text[:_LINE_CHARS]}…"


def _query_or_nothing(asked: Asked) -> str:
    try:
        return to_query(asked)
    except RequestError:
        return ""
