"""How answers are written: OpenAI's two forms, whole and in pieces.

Pieces are put together from strings that were made once: at thousands of tokens a second, building and encoding
a dictionary for each of them would take time from the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from burnish.engine.sampled import TokenLogprob
from burnish.serve.jobs import Answer, Job
from burnish.serve.token_texts import TokenTexts

PromptLogprobs = Sequence[TokenLogprob | None]


class Form(Protocol):
    """One of OpenAI's two forms, for one job."""

    def whole(self, answers: Sequence[Answer], prompt_logprobs: dict[int, PromptLogprobs]) -> bytes: ...

    def opening(self, answer: Answer, prompt_logprobs: PromptLogprobs | None) -> bytes: ...

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, finish: str | None) -> bytes: ...

    def closing(self) -> bytes: ...


class _Writer:
    def __init__(self, job: Job, *, kind: str, prefix: str) -> None:
        self.job = job
        self.kind = kind
        self.job_id = f"{prefix}-{job.job_id}"
        self._head = (
            f'data: {{"id":"{self.job_id}","object":"{kind}","created":{job.created},'
            f'"model":{quoted(job.model)},"system_fingerprint":"{job.fingerprint}","choices":['
        )
        self._tail = ',"usage":null}\n\n' if job.include_usage else "}\n\n"

    def event(self, choice: str) -> bytes:
        """One event with one choice, which is JSON already."""
        if self.job.continuous_usage:
            return f'{self._head}{choice}],"usage":{json.dumps(self.job.usage())}}}\n\n'.encode()
        return f"{self._head}{choice}]{self._tail}".encode()

    def closing(self) -> bytes:
        """The usage where it was asked for, and the end of the stream."""
        usage = ""
        if self.job.include_usage:
            usage = f'{self._head}],"usage":{json.dumps(self.job.usage())}}}\n\n'
        return f"{usage}data: [DONE]\n\n".encode()

    def document(self, choices: list[dict[str, Any]]) -> bytes:
        record = {
            "id": self.job_id,
            "object": self.kind,
            "created": self.job.created,
            "model": self.job.model,
            "system_fingerprint": self.job.fingerprint,
            "choices": choices,
            "usage": self.job.usage(),
        }
        return json.dumps(record).encode()


class CompletionForm:
    """`/v1/completions`."""

    def __init__(self, job: Job, texts: TokenTexts) -> None:
        self._job = job
        self._writer = _Writer(job, kind="text_completion", prefix="cmpl")
        self._texts = texts
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], prompt_logprobs: dict[int, PromptLogprobs]) -> bytes:
        """The whole reply.

        Args:
            prompt_logprobs: by prompt, where they were asked for.
        """
        echo = self._job.echo
        choices = []
        for answer in answers:
            logprobs = None
            if self._job.params.logprobs is not None:
                logprobs = self._logprobs(answer.index, [*prompt_logprobs.get(answer.prompt, ()), *answer.logprobs])
            before = "" if echo is None else echo[answer.prompt]
            choices.append(
                {
                    "index": answer.index,
                    "text": before + "".join(answer.texts),
                    "logprobs": logprobs,
                    "finish_reason": answer.finish_reason,
                }
            )
        return self._writer.document(choices)

    def opening(self, answer: Answer, prompt_logprobs: PromptLogprobs | None) -> bytes:
        """What comes before an answer's first piece: its prompt, where it is to be echoed."""
        if self._job.echo is None:
            return b""
        return self._event(answer.index, self._job.echo[answer.prompt], prompt_logprobs, None)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, finish: str | None) -> bytes:
        """One event of a stream."""
        return self._event(index, text, logprobs, finish)

    def closing(self) -> bytes:
        """As `_Writer.closing`."""
        return self._writer.closing()

    def _event(self, index: int, text: str, logprobs: PromptLogprobs | None, finish: str | None) -> bytes:
        scored = "null" if logprobs is None else json.dumps(self._logprobs(index, logprobs))
        ending = "null" if finish is None else f'"{finish}"'
        return self._writer.event(
            f'{{"index":{index},"text":{quoted(text)},"logprobs":{scored},"finish_reason":{ending}}}'
        )

    def _logprobs(self, index: int, logprobs: PromptLogprobs) -> dict[str, Any]:
        tokens = [self._texts.text_of(one.token_id) if one is not None else None for one in logprobs]
        if tokens and tokens[0] is None:  # nothing comes before a prompt's first token, so it has no probability
            tokens[0] = self._texts.text_of(self._job.prompts[index // self._job.params.n].ids[0])
        offsets = []
        offset = self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            assert token is not None
            offset += 0 if token.startswith("bytes:") else len(token)
        self._offsets[index] = offset
        top = None
        if self._job.params.logprobs:
            top = [None if one is None else self._top(one) for one in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else _finite(one.logprob) for one in logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, logprob in one.top:
            found.setdefault(self._texts.text_of(token_id), _finite(logprob))
        return found


class ChatForm:
    """`/v1/chat/completions`."""

    def __init__(self, job: Job, texts: TokenTexts) -> None:
        self._job = job
        self._whole = _Writer(job, kind="chat.completion", prefix="chatcmpl")
        self._writer = _Writer(job, kind="chat.completion.chunk", prefix="chatcmpl")
        self._texts = texts

    def whole(self, answers: Sequence[Answer], prompt_logprobs: dict[int, PromptLogprobs]) -> bytes:
        """The whole reply."""
        scored = self._job.params.logprobs is not None
        return self._whole.document(
            [
                {
                    "index": answer.index,
                    "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
                    "logprobs": self._logprobs(answer.logprobs) if scored else None,
                    "finish_reason": answer.finish_reason,
                }
                for answer in answers
            ]
        )

    def opening(self, answer: Answer, prompt_logprobs: PromptLogprobs | None) -> bytes:
        """What comes before an answer's first piece: who speaks."""
        return self._event(answer.index, '"role":"assistant","content":""', "null", "null")

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None, finish: str | None) -> bytes:
        """One event of a stream."""
        scored = "null" if logprobs is None else json.dumps(self._logprobs(logprobs))
        delta = f'"content":{quoted(text)}' if text or finish is None else ""
        return self._event(index, delta, scored, "null" if finish is None else f'"{finish}"')

    def closing(self) -> bytes:
        """As `_Writer.closing`."""
        return self._writer.closing()

    def _event(self, index: int, delta: str, logprobs: str, finish: str) -> bytes:
        return self._writer.event(
            f'{{"index":{index},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{finish}}}'
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._token(one.token_id, one.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in one.top],
            }
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._texts.bytes_of(token_id)
        return {"token": self._texts.text_of(token_id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)
