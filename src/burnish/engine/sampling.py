"""What a request may ask of the sampler, and the checks on it. Torch-free; the drawing itself is in `sampler.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from burnish.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
        max_tokens: most tokens to produce.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 keeps all.
        repetition_penalty: logits of tokens already seen (prompt and answer) are divided by it when positive and
            multiplied when negative (Keskar et al., 2019, arXiv:1909.05858); 1 changes nothing.
        seed: the same seed draws the same numbers whatever else is in the batch; None draws fresh ones.
        stop: strings that end the answer; the text is cut before the first of them.
        stop_token_ids: tokens that end the answer, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens (`stop_token_ids` still end the answer).
        min_tokens: neither end tokens nor stop strings end the answer before this many tokens.

    Raises:
        RequestError: a value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("max_tokens", self.max_tokens, _is_int(self.max_tokens) and self.max_tokens >= 1, "an integer >= 1")
        _check("temperature", self.temperature, _is_number(self.temperature) and self.temperature >= 0, "a number >= 0")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 keeps all tokens)")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        _check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_number(penalty) and penalty > 0, "a number > 0")
        _check("seed", self.seed, self.seed is None or _is_int(self.seed), "an integer or None")
        _check("stop", self.stop, all(isinstance(text, str) and text for text in stop), "non-empty strings")
        ids = self.stop_token_ids
        _check("stop_token_ids", ids, all(_is_int(token) and token >= 0 for token in ids), "integers >= 0")
        _check("min_tokens", self.min_tokens, _is_int(self.min_tokens) and self.min_tokens >= 0, "an integer >= 0")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens is larger than max_tokens",
                got=f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}",
            )

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature == 0


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise RequestError(f"{name} is out of range", got=repr(value), expected=expected)
