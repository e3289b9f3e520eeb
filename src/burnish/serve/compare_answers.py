"""One prompt to several models: their answers as they grow, and what became of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from burnish.errors import RequestError
from burnish.measure.sql_text import statement_in
from burnish.serve.admission import Busy
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked
from burnish.serve.compare_sql import Query, Rows, SqlRunner
from burnish.serve.faults import Fault, fault_of
from burnish.serve.jobs import Answer, Job
from burnish.serve.tickets import Gone, Ticket

Status = Literal["idle", "loading", "waiting", "reading", "answering", "querying", "done", "stopped", "failed"]

# Nobody reads faster than this, and every picture of the page costs the engines' cores something.
_PAUSE_S = 0.08


@dataclass(eq=False)
class AnswerState:
    """What is known of one model's answer.

    Attributes:
        status: "loading" the model, "waiting" for its turn or place, "reading" the prompt, "answering", "querying" the
            database; then how it ended.
        prompt_tokens, num_tokens: of the prompt, and of the answer so far (its end token included).
        ttft_s: from asking to the first piece of text or token.
        answering_s: from the first token to the last one.
        finish_reason: "stop" or "length".
        error: one line, where it failed.
        kv_used_bytes: most of the cache that was in use meanwhile: at least what this answer took, which its end tells.
        rows: what its SQL gave; None where none was run.
    """

    status: Status = "idle"
    text: str = ""
    prompt_tokens: int = 0
    num_tokens: int = 0
    ttft_s: float | None = None
    answering_s: float = 0.0
    finish_reason: str | None = None
    error: str | None = None
    kv_used_bytes: int = 0
    rows: Rows | None = None

    @property
    def running(self) -> bool:
        return self.status in ("loading", "waiting", "reading", "answering", "querying")

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first one over their time; None below two tokens."""
        if self.num_tokens < 2 or self.answering_s <= 0:
            return None
        return (self.num_tokens - 1) / self.answering_s


async def ask(
    models: Sequence[ComparedModel],
    asked: Asked,
    *,
    sql: SqlRunner,
    stop: asyncio.Event,
    pause_s: float = _PAUSE_S,
) -> AsyncIterator[list[AnswerState]]:
    """Ask all models; gives the same list of states again and again as they change, and once more at the end.

    An error of one model is in its state, and the others go on. Whatever ends this iterator (`stop`, closing it,
    cancelling it) takes the requests from the engines.

    Args:
        sql: runs the answers' SQL where the prompt has a database.
        stop: ends what still runs.
    """
    states = [AnswerState(status="waiting") for _ in models]
    changed = asyncio.Event()

    async def run() -> None:
        pairs = list(zip(models, states))
        if not asked.in_turn:
            await asyncio.gather(*[_answer(*pair, asked, sql=sql, changed=changed) for pair in pairs])
            return
        for pair in pairs:
            await _answer(*pair, asked, sql=sql, changed=changed)

    running = asyncio.create_task(run())
    stopping = asyncio.create_task(stop.wait())
    try:
        while not running.done() and not stopping.done():
            waking = asyncio.create_task(changed.wait())
            try:
                await asyncio.wait([running, stopping, waking], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waking.cancel()
            changed.clear()
            yield states
            await asyncio.wait([running, stopping], timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
    for state in states:
        if state.running:
            state.status = "stopped"
    yield states


async def _answer(
    model: ComparedModel, state: AnswerState, asked: Asked, *, sql: SqlRunner, changed: asyncio.Event
) -> None:
    """Follow one answer to its end, which the state tells; only being cancelled gets out."""
    try:
        await _follow(model, state, asked, changed)
        if state.status != "failed" and asked.database is not None:
            state.status = "querying"
            changed.set()
            reference = asked.reference
            state.rows = await sql.run(
                Query(
                    asked.database,
                    statement_in(state.text),
                    None if reference is None else reference.answer,
                    reference is not None and reference.ordered,
                )
            )
        state.status = "done"
    except Exception as error:
        state.status = "failed"
        state.error = _line(error)
    changed.set()


async def _follow(model: ComparedModel, state: AnswerState, asked: Asked, changed: asyncio.Event) -> None:
    service = model.service
    if model.state == "starting":
        state.status = "loading"
        changed.set()
        await service.engine.settled()
        state.status = "waiting"
    trouble = model.trouble
    if trouble is not None:
        raise RequestError(trouble)
    started_s = time.monotonic()
    prompt, params = await model.encode(asked), asked.params()
    state.prompt_tokens = len(prompt.ids)
    job = Job(
        kind="page",
        model=model.model.name,
        adapter=model.model.adapter,
        fingerprint=model.digest,
        prompts=[prompt],
        params=params,
        stream=True,
        arrival_s=started_s,
    )
    ticket = _enter(model, job)
    outcome = "failed"
    try:
        await ticket.queued()
        state.status = "reading"
        changed.set()
        await _read(model, state, job, ticket, changed)
        outcome = "ok"
    except RequestError:
        outcome = "refused"
        raise
    except asyncio.CancelledError:
        outcome = "gone"
        raise
    finally:
        # Whatever happened: nobody waits for this answer any more.
        service.engine.leave(ticket, Gone())
        service.metrics.ended(job, outcome, time.monotonic() - started_s)


def _enter(model: ComparedModel, job: Job) -> Ticket:
    """Room for one answer, and the engine's work on it.

    Raises:
        Busy: there is no room.
        WorkerError: there is no engine at this moment.
    """
    service = model.service
    try:
        service.admission.enter(1, ready=service.engine.state == "ready")
    except Busy as busy:
        service.metrics.rejections.labels(busy.reason).inc()
        raise
    try:
        return service.engine.submit(job.prompts, job.params, adapter=job.adapter, on_ended=service.admission.leave)
    except BaseException:
        service.admission.leave(1)
        raise


async def _read(model: ComparedModel, state: AnswerState, job: Job, ticket: Ticket, changed: asyncio.Event) -> None:
    answer, first_s = Answer(0, 0), 0.0
    while state.finish_reason is None:
        for piece in await ticket.news():
            if piece.finish_reason in ("error", "aborted"):
                raise RequestError(piece.error or "the answer was cut off")
            now_s = time.monotonic()
            if state.ttft_s is None:
                first_s, state.ttft_s = now_s, now_s - job.arrival_s
                state.status = "answering"
                model.service.metrics.began(job, state.ttft_s)
            answer.take(piece)
            job.completion_tokens += len(piece.token_ids)
            state.text += piece.text
            state.num_tokens = answer.num_tokens
            state.answering_s = now_s - first_s
            state.finish_reason = piece.finish_reason
            if piece.finish_reason is not None:
                # The engine's own clock, without the way here.
                state.answering_s = piece.decode_s
                state.kv_used_bytes = max(state.kv_used_bytes, piece.kv_bytes)
                model.service.metrics.answered(job, answer, piece.decode_s)
        memory = model.memory()
        if memory is not None:
            state.kv_used_bytes = max(state.kv_used_bytes, memory.kv_used_bytes)
        changed.set()


def _line(error: Exception) -> str:
    fault: Fault = fault_of(error)
    return fault.message
