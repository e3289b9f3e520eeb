"""One streamed call to a server that speaks OpenAI's protocol: what was sent, and what has come back. Torch-free."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from burnish.engine.outputs import Completion, FinishReason, RequestMetrics, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError


@dataclass(kw_only=True)
class OpenAICall:
    """One request on its way."""

    index: int
    path: str
    body: bytes
    prompt: str | None
    params: SamplingParams
    arrival_s: float = 0.0
    end_s: float = 0.0
    text: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    closed: bool = False
    _sock: socket.socket | None = None

    def take(self, piece: str) -> None:
        self.text.append(piece)
        self.times_s.append(time.perf_counter())

    def hold(self, sock: socket.socket) -> None:
        """Remember the connection, so that `close` can end it from another thread."""
        self._sock = sock
        if self.closed:
            self.close()

    def close(self) -> None:
        """Abort the request if it is still running."""
        self.closed = True
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def output_tokens(self) -> int:
        """As the server counts them; a server that does not is taken to send one token a piece."""
        count = self.usage.get("completion_tokens")
        return count if isinstance(count, int) else len(self.text)

    def check(self) -> None:
        """Refuse an answer that ended where `ignore_eos` says to go on."""
        if self.params.ignore_eos and not self.params.stop and self.output_tokens < self.params.max_tokens:
            raise RequestError(
                "the server does not honour ignore_eos",
                got=f"{self.output_tokens} tokens",
                expected=self.params.max_tokens,
            )

    def output(self) -> RequestOutput:
        reason: FinishReason = "length" if self.finish_reason == "length" else "stop"
        completion = Completion(text="".join(self.text), token_ids=(), finish_reason=reason)
        prompt_tokens = self.usage.get("prompt_tokens")
        tokens, times = self.output_tokens, self.times_s
        last = times[-1] if times else self.end_s
        return RequestOutput(
            index=self.index,
            prompt=self.prompt,
            text=completion.text,
            token_ids=(),
            finish_reason=reason,
            choices=(completion,),
            metrics=RequestMetrics(
                prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else 0,
                output_tokens=tokens,
                ttft_ms=(times[0] - self.arrival_s) * 1e3 if times else None,
                tpot_ms=(last - times[0]) * 1e3 / (tokens - 1) if times and tokens > 1 else None,
                e2e_ms=(last - self.arrival_s) * 1e3,
                itl_ms=tuple((after - before) * 1e3 for before, after in itertools.pairwise(times)),
            ),
        )
