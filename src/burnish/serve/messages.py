"""What the server and its engine's process say to each other. Plain values, torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from burnish.engine.outputs import EngineStats, FinishReason
from burnish.engine.prompts import EncodedPrompt
from burnish.engine.sampled import TokenLogprob
from burnish.engine.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message: how to make the engine.

    Attributes:
        make: called with no arguments in the new process, so it has to be picklable; gives a `NativeEngine`.
        interval_s: see `ServeSettings.stream_interval_s`.
    """

    make: Callable[[], Any]
    interval_s: float


class Submit(NamedTuple):
    """Queue a request under a number that the server chose."""

    number: int
    prompt: EncodedPrompt
    params: SamplingParams
    adapter: str | None


class Abort(NamedTuple):
    """End a request; nothing is said about it any more."""

    number: int


class Ready(NamedTuple):
    """The engine is loaded and warm."""

    stats: EngineStats


class Refused(NamedTuple):
    """The engine could not be made. The first time the same would happen again; later it may be for want of memory."""

    kind: str
    message: str


class Queued(NamedTuple):
    """A request was found to be in order and waits for its turn."""

    number: int


class Failed(NamedTuple):
    """A request ended without an answer.

    Attributes:
        by_request: the request is at fault, not the engine.
    """

    number: int
    message: str
    by_request: bool


class Piece(NamedTuple):
    """What is new about one answer.

    Attributes:
        choice: which of the request's answers.
        text: joined, all pieces are the answer.
        token_ids: new tokens, which may come before their text.
        logprobs: one entry per new token, where they were asked for.
        finish_reason: set on the answer's last piece.
        error: why it ended, where the reason is "error".
        prompt_logprobs: on the first piece of the first answer, where they were asked for.
        decode_s: on the last piece, seconds between the first and the last token.
        kv_bytes: on the last piece, what the answer and its prompt took of the cache at their most.
    """

    number: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    decode_s: float = 0.0
    kv_bytes: int = 0


class Stats(NamedTuple):
    """The engine's load at this moment."""

    stats: EngineStats
