"""What the sampler hands back for one position. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from burnish.errors import RequestError


class TokenLogprob(NamedTuple):
    """One token's log-probability (natural logarithm) under the model itself, and the likeliest tokens in its place.

    Attributes:
        top: (token id, log-probability) pairs, the likeliest first; as many as the request asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(NamedTuple):
    """The token chosen for one sequence.

    Attributes:
        token_id: -1 when there is a `failure`.
        logprob: None unless the request asks for log-probabilities.
        failure: why this sequence cannot go on (its grammar exceeded a limit); other sequences are not affected.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    failure: RequestError | None = None
