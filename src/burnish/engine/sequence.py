"""One request while it lives: its tokens, its place in the cache, its text and its clock readings. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from burnish.engine.outputs import FinishReason, RequestOutput, make_metrics
from burnish.engine.sampling import SamplingParams
from burnish.engine.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens produced so far.

    Attributes:
        request_id: unique within the engine.
        index: position of the prompt in its call.
        prompt_ids: the prompt's tokens, at least one.
        end_ids: tokens that end the answer (the model's and the request's).
        max_tokens: `params.max_tokens`, cut to what the context leaves.
        num_computed: tokens whose keys and values are in the cache.
        slot: row of the cache, -1 while waiting or finished.
    """

    request_id: int
    index: int
    prompt: str | None
    prompt_ids: SequenceOf[int]
    params: SamplingParams
    end_ids: frozenset[int]
    max_tokens: int
    text: TextStream
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    slot: int = -1
    finish_reason: FinishReason | None = None
    arrival_s: float = field(default_factory=time.perf_counter)
    token_times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more while the prompt is being read."""
        return self.num_tokens - self.num_computed

    @property
    def most_tokens(self) -> int:
        """The length this sequence may grow to."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def bans_end(self) -> bool:
        """True while `min_tokens` forbids the next token to be an end token."""
        return len(self.token_ids) < self.params.min_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens start..end-1 of prompt and answer together."""
        length = len(self.prompt_ids)
        if start >= length:
            return self.token_ids[start - length : end - length]
        return [*self.prompt_ids[start:end], *self.token_ids[: max(0, end - length)]]

    def append(self, token_id: int, *, now_s: float) -> None:
        """Take one sampled token, and finish when it ends the answer."""
        self.token_ids.append(token_id)
        self.token_times_s.append(now_s)
        may_stop = len(self.token_ids) >= self.params.min_tokens
        if token_id in self.end_ids or self.text.push(token_id, may_stop=may_stop):
            self.finish("stop", now_s=now_s)
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length", now_s=now_s)

    def finish(self, reason: FinishReason, *, now_s: float) -> None:
        """Close the answer; the text becomes final."""
        if self.text.finish(may_stop=len(self.token_ids) >= self.params.min_tokens) and reason == "length":
            reason = "stop"
        self.finish_reason = reason
        self.end_s = now_s

    def output(self) -> RequestOutput:
        """The finished request as its caller sees it."""
        assert self.finish_reason is not None
        return RequestOutput(
            index=self.index,
            prompt=self.prompt,
            text=self.text.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            metrics=make_metrics(
                prompt_tokens=len(self.prompt_ids),
                arrival_s=self.arrival_s,
                token_times_s=self.token_times_s,
                end_s=self.end_s,
            ),
        )
