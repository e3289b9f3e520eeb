"""What a request may ask of the sampler, and the checks on it. Torch-free; the drawing itself is in `sampler.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from burnish.errors import RequestError

ConstraintKind: TypeAlias = Literal["json_schema", "regex", "grammar"]

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
# Divided by less, logits leave what float32 tells apart; the likeliest token is then all there is to draw.
_COLDEST = 1e-5
# A longer schema, expression or grammar is refused before anything compiles it.
MAX_CONSTRAINT_CHARS = 65536


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt.

    Attributes:
        max_tokens: most tokens to produce.
        temperature: 0 is greedy, as is less than 1e-5; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 keeps all.
        repetition_penalty: logits of tokens already seen (prompt and answer) are divided by it when positive and
            multiplied when negative (Keskar et al., 2019, arXiv:1909.05858); 1 changes nothing.
        presence_penalty: taken once from the logit of every token the answer holds so far (the prompt does not count);
            -2 to 2, and 0 changes nothing.
        frequency_penalty: as `presence_penalty`, taken once for each time the answer holds the token.
        logit_bias: token id -> number in -100..100 that is added to its logit. Kept as pairs, sorted by id.
        seed: the same seed draws the same numbers whatever else is in the batch; None draws fresh ones.
        n: answers to produce. Each draws its own numbers from the seed.
        stop: strings that end the answer; the text is cut before the first of them.
        include_stop: leave the stop string at the end of the text.
        stop_token_ids: tokens that end the answer, beside the model's own end tokens.
        ignore_eos: go on past the model's end tokens (`stop_token_ids` still end the answer).
        min_tokens: neither end tokens nor stop strings end the answer before this many tokens.
        logprobs: report log-probabilities (natural logarithm) of each produced token and of this many likeliest ones,
            0 to 20; None reports none. They are the model's own: before penalties, bias, constraint and temperature.
        prompt_logprobs: the same for the prompt's tokens.
        json_schema: the answer is JSON that this schema allows; a mapping or its text. Kept as text.
        regex: the whole answer matches this regular expression (Rust syntax: no look-around, no back-references).
        grammar: the answer is a sentence of this context-free grammar, in Lark's notation; it begins at `start`.

    Raises:
        RequestError: a value is out of its range, or two of them exclude each other.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        self._check_lengths()
        self._check_choice()
        self._check_constraint()

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is always taken."""
        return self.temperature < _COLDEST

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: (token id, bias) pairs, sorted by id."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @cached_property
    def plain_greedy(self) -> bool:
        """True when the arg-max of the model's own logits is all that is ever needed."""
        return (
            self.greedy
            and self.min_tokens == 0
            and self.logprobs is None
            and self.prompt_logprobs is None
            and not self.logit_bias
            and not self.penalised
            and self.constraint is None
        )

    @cached_property
    def penalised(self) -> bool:
        """True when logits depend on the tokens seen."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def constraint(self) -> tuple[ConstraintKind, str] | None:
        """What the answer must follow, as kind and text."""
        if self.json_schema is not None:
            return "json_schema", str(self.json_schema)
        if self.regex is not None:
            return "regex", self.regex
        return None if self.grammar is None else ("grammar", self.grammar)

    def _check_lengths(self) -> None:
        _check("max_tokens", self.max_tokens, _is_int(self.max_tokens) and self.max_tokens >= 1, "an integer >= 1")
        _check("n", self.n, _is_int(self.n) and 1 <= self.n <= MAX_CHOICES, f"an integer in 1..{MAX_CHOICES}")
        _check("stop", self.stop, all(isinstance(text, str) and text for text in self.stop), "non-empty strings")
        for name in ("include_stop", "ignore_eos"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        ids = self.stop_token_ids
        _check("stop_token_ids", ids, all(_is_int(token) and token >= 0 for token in ids), "integers >= 0")
        _check("min_tokens", self.min_tokens, _is_int(self.min_tokens) and self.min_tokens >= 0, "an integer >= 0")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                "min_tokens is larger than max_tokens",
                got=f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}",
            )

    def _check_choice(self) -> None:
        _check("temperature", self.temperature, _is_number(self.temperature) and self.temperature >= 0, "a number >= 0")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 keeps all tokens)")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        _check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        penalty = self.repetition_penalty
        _check(
            "repetition_penalty", penalty, _is_number(penalty) and 0.01 <= penalty <= 100, "a number from 0.01 to 100"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and -2 <= value <= 2, "a number in [-2, 2]")
        _check("seed", self.seed, self.seed is None or _is_int(self.seed), "an integer or None")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            good = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _check(name, value, good, f"an integer in 0..{MAX_LOGPROBS} or None")

    def _check_constraint(self) -> None:
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if not given:
            return
        if len(given) > 1:
            raise RequestError("an answer can follow one constraint only", got=" and ".join(given))
        [name] = given
        text = getattr(self, name)
        _check(name, text, isinstance(text, str) and bool(text), "a non-empty text")
        if len(text) > MAX_CONSTRAINT_CHARS:
            raise RequestError(
                f"{name} is too long", got=f"{len(text)} characters", expected=f"at most {MAX_CONSTRAINT_CHARS}"
            )
        if self.ignore_eos or self.min_tokens:
            other = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(
                f"{name} and {other} exclude each other",
                remedy="The constraint alone says where the answer may end.",
            )


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    pairs = list(bias.items()) if isinstance(bias, Mapping) else bias
    good = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and _is_int(pair[0])
        and pair[0] >= 0
        and _is_number(pair[1])
        and abs(pair[1]) <= MAX_BIAS
        for pair in pairs
    )
    _check("logit_bias", bias, good, "token ids >= 0, each with a number in [-100, 100]")
    assert isinstance(pairs, (list, tuple))
    ids = [pair[0] for pair in pairs]
    _check("logit_bias", bias, len(set(ids)) == len(ids), "each token id once")
    return tuple(sorted((token_id, float(value)) for token_id, value in pairs))


def _schema_text(schema: object) -> str:
    """One spelling of a JSON schema; the order of keys is kept, as properties are written in it."""
    if isinstance(schema, str) and len(schema) > MAX_CONSTRAINT_CHARS:
        return schema  # refused by its length
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(value, Mapping):
            return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"json_schema is not JSON: {str(error) or type(error).__name__}", expected="a JSON schema"
        ) from error
    raise RequestError("json_schema is of the wrong kind", got=type(schema).__name__, expected="a JSON object")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise RequestError(f"{name} is out of range", got=_short(value), expected=expected)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
