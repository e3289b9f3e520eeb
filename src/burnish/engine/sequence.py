"""One request while it lives: its tokens, its place in the cache, its text and its clock readings. Torch-free."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from burnish.engine.outputs import Completion, FinishReason
from burnish.engine.sampled import Sampled, TokenLogprob
from burnish.engine.sampling import SamplingParams
from burnish.engine.text_stream import TextStream

if TYPE_CHECKING:
    from burnish.engine.constrained import Constraint
    from burnish.engine.logprobs import PromptLogprobs


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens produced so far.

    Attributes:
        request_id: unique within the engine.
        index: position of the prompt in its call.
        prompt_ids: the prompt's tokens, at least one.
        end_ids: tokens that end the answer (the model's and the request's).
        max_tokens: `params.max_tokens`, cut to what the context leaves.
        adapter_name: the LoRA adapter it runs with, None for the base alone.
        adapter, adapter_number: that adapter's index, -1 for none, and the number by which the cache tells it apart, 0
            for none; set when the sequence is queued.
        choice: which of the request's `params.n` answers this is.
        prompt_logprobs: gathers the prompt's own log-probabilities.
        logprobs: of the tokens in `token_ids`, where they are asked for.
        error: why it ended, where the reason is "error".
        constraint: what the answer has to follow, None where it is free.
        num_computed: tokens whose keys and values are in the cache.
        block_table: blocks of the cache, in the tokens' order; -1 where no window reaches any more.
        block_hashes: digests of the full blocks so far, see `BlockManager.hashes`.
        num_published, num_dropped: leading blocks that were offered to others, and that were given back.
        rope_len: see `StepInputs.rope_lens_S`; the prompt's length.
        cache_salt: sequences whose salts differ never share blocks.
        drafts: tokens that may follow, to be verified in the next step; set by a drafter.
        num_drafted, num_accepted: drafts verified so far, and right ones among them.
        running: it has a place in the batch; the scheduler's.
        num_preemptions: how often its blocks were taken away.
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
    adapter_name: str | None = None
    adapter: int = -1
    adapter_number: int = 0
    choice: int = 0
    constraint: Constraint | None = None
    prompt_logprobs: PromptLogprobs | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str | None = None
    num_computed: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_dropped: int = 0
    rope_len: int = 0
    cache_salt: tuple[int, ...] = ()
    drafts: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    running: bool = False
    num_preemptions: int = 0
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
        """Tokens not yet in the cache: 1 while decoding, more while the prompt is being read or read again."""
        return self.num_tokens - self.num_computed

    @property
    def most_tokens(self) -> int:
        """The length this sequence may grow to."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def scoring_start(self) -> int:
        """First position whose logits are still wanted to score the prompt; `num_tokens` where none are."""
        scored = self.prompt_logprobs
        return self.num_tokens if scored is None or scored.complete else scored.position

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

    def take(self, sampled: Sampled, *, now_s: float) -> None:
        """Take one chosen token, and finish when it ends the answer or when there is none."""
        if sampled.failure is not None:
            self.error = sampled.failure.message
            self.finish("error", now_s=now_s)
            return
        if sampled.logprob is not None:
            # An interrupted step may have left one whose token never came.
            self.logprobs[len(self.token_ids) :] = [sampled.logprob]
        self.append(sampled.token_id, now_s=now_s)

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

    def completion(self) -> Completion:
        """The finished answer as its caller sees it."""
        assert self.finish_reason is not None
        return Completion(
            text=self.text.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            error=self.error,
        )
