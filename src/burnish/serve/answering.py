"""The response to a job: one JSON document, or events as they come; and the watch over whoever waits for it."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from burnish.engine.sampled import TokenLogprob
from burnish.errors import RequestError
from burnish.serve.engine_client import EngineClient
from burnish.serve.faults import Fault, fault_of
from burnish.serve.forms import Form, PromptLogprobs
from burnish.serve.jobs import Answer, Job
from burnish.serve.messages import Piece
from burnish.serve.metrics import Metrics
from burnish.serve.tickets import Gone, Ticket

_JSON = (b"content-type", b"application/json")
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class AnswerResponse(Response):
    """Answers a job that the engine has. A client that goes away ends it, and so does whatever ends this response."""

    def __init__(
        self,
        job: Job,
        form: Form,
        *,
        engine: EngineClient,
        ticket: Ticket,
        metrics: Metrics,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._job = job
        self._form = form
        self._engine = engine
        self._ticket = ticket
        self._metrics = metrics
        n = job.params.n
        self._answers = [Answer(index, index // n) for index in range(job.num_answers)]
        self._first_number = ticket.numbers[0]
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._begun = False
        self._sent_start = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._until_gone(receive))
        outcome = "ok"
        try:
            await (self._stream(send) if self._job.stream else self._whole(send))
        except Gone:
            outcome = "gone"
        except asyncio.CancelledError:  # how Ray Serve says that the client left
            outcome = "gone"
            raise
        except Exception as error:
            fault = fault_of(error)
            outcome = "refused" if fault.status < 500 else "failed"
            await self._send_fault(send, fault)
        finally:
            # Whatever happened: nobody waits for this answer any more.
            self._engine.leave(self._ticket, Gone())
            watch.cancel()
            self._metrics.ended(self._job, outcome, time.monotonic() - self._job.arrival_s)

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._engine.leave(self._ticket, Gone())

    async def _whole(self, send: Send) -> None:
        while any(answer.finish_reason is None for answer in self._answers):
            pieces = await self._ticket.news()
            self._note_prompt_logprobs(pieces)
            for piece in pieces:
                self._take(piece)
        await self._send(send, 200, [_JSON], self._form.whole(self._answers, self._prompt_logprobs))

    async def _stream(self, send: Send) -> None:
        await self._ticket.queued()
        await self._send(send, 200, _EVENTS, None)
        held: list[Piece] = []
        opened: set[int] = set()
        unfinished = len(self._answers)
        while unfinished:
            batch = _merged(held + await self._ticket.news())
            held = []
            self._note_prompt_logprobs(batch)
            events: list[bytes] = []
            for piece in batch:
                answer = self._answer_of(piece)
                scored = self._prompt_logprobs.get(answer.prompt)
                if self._job.params.prompt_logprobs is not None and scored is None:
                    held.append(piece)  # the prompt's own probabilities are on their way, and come first
                    continue
                self._take(piece)
                if answer.index not in opened:
                    opened.add(answer.index)
                    events.append(self._form.opening(answer, scored))
                if piece.text or piece.logprobs or piece.finish_reason or self._job.continuous_usage:
                    events.append(self._form.piece(answer.index, piece.text, piece.logprobs, piece.finish_reason))
                unfinished -= piece.finish_reason is not None
            if not unfinished:
                events.append(self._form.closing())
            body = b"".join(events)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": bool(unfinished)})

    def _answer_of(self, piece: Piece) -> Answer:
        return self._answers[(piece.number - self._first_number) * self._job.params.n + piece.choice]

    def _note_prompt_logprobs(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.prompt_logprobs is not None:
                self._prompt_logprobs[self._answer_of(piece).prompt] = piece.prompt_logprobs

    def _take(self, piece: Piece) -> None:
        if piece.finish_reason == "error":
            raise RequestError(piece.error or "the answer cannot be continued")
        if piece.finish_reason == "aborted":
            raise Gone
        answer = self._answer_of(piece)
        self._job.completion_tokens += len(piece.token_ids)
        if not self._begun:
            self._begun = True
            self._metrics.began(self._job, time.monotonic() - self._job.arrival_s)
        answer.take(piece)
        if piece.finish_reason is not None:
            self._metrics.answered(self._job, answer, piece.decode_s)

    async def _send_fault(self, send: Send, fault: Fault) -> None:
        if self._sent_start:
            event = b"data: " + fault.body() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
            return
        headers = [_JSON, *((name.lower().encode(), value.encode()) for name, value in fault.headers.items())]
        await self._send(send, fault.status, headers, fault.body())

    async def _send(self, send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes | None) -> None:
        """Send the head, and the body where it is whole."""
        self._sent_start = True
        if body is not None:
            headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if body is not None:
            await send({"type": "http.response.body", "body": body, "more_body": False})


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Pieces that waited together, one for each answer."""
    if len(pieces) < 2:
        return pieces
    found: dict[tuple[int, int], Piece] = {}
    for piece in pieces:
        key = (piece.number, piece.choice)
        before = found.get(key)
        if before is not None:
            logprobs: tuple[TokenLogprob, ...] | None = None
            if before.logprobs is not None:
                logprobs = before.logprobs + (piece.logprobs or ())
            piece = piece._replace(
                text=before.text + piece.text,
                token_ids=before.token_ids + piece.token_ids,
                logprobs=logprobs,
                prompt_logprobs=before.prompt_logprobs,
            )
        found[key] = piece
    return list(found.values())
