"""One HTTP request that wants answers, from the moment it is understood."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from burnish.engine.prompts import EncodedPrompt
from burnish.engine.sampled import TokenLogprob
from burnish.engine.sampling import SamplingParams
from burnish.serve.messages import Piece


@dataclass(eq=False, kw_only=True)
class Job:
    """What to answer, and how.

    Attributes:
        model: the name that the client chose, which is the base's or an adapter's.
        adapter: the engine's name for it, None for the base.
        echo: texts of the prompts to put before the answers; None to put nothing.
        include_usage, continuous_usage: of streams; see `StreamOptions`.
        arrival_s: on the monotonic clock.
    """

    kind: str
    model: str
    adapter: str | None
    fingerprint: str
    prompts: list[EncodedPrompt]
    params: SamplingParams
    stream: bool
    echo: list[str] | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    arrival_s: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    job_id: str = field(default_factory=lambda: secrets.token_hex(12))
    completion_tokens: int = 0

    @property
    def answer_id(self) -> str:
        """What the answer's JSON calls it."""
        return f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{self.job_id}"

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many answers it gets."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(eq=False)
class Answer:
    """One answer while it grows.

    Attributes:
        index: its place among all of the job's answers.
        prompt: the place of its prompt.
    """

    index: int
    prompt: int
    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.num_tokens += len(piece.token_ids)
        if piece.logprobs:
            self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason
