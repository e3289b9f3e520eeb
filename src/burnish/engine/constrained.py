"""Answers that follow a JSON schema, a regular expression or a grammar, through the llguidance library. Torch-free.

A grammar is compiled once per engine and kept; each sequence walks its own copy. What a text may ask for is bounded:
its length, the time to compile it, and the library's own limits on grammar and lexer, for compiling and for each token.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from burnish._optional import require
from burnish.engine.sampling import ConstraintKind
from burnish.errors import RequestError

# The library compiles multipleOf into one state per remainder: 10^4 take 20 ms, 10^6 take 4 s and 400 MB.
_LARGEST_MULTIPLE = 10_000
# About 1 to 2 kB each, per compiled grammar.
_LEXER_STATES = 50_000
# Compilers that ran over their time cannot be stopped, only waited for; beyond these no further one is started.
_MAX_OVERDUE = 2
# One style: nothing or one space after "," and ":". Free white space lets a weak model write it until its tokens end.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

_NAMES: dict[ConstraintKind, str] = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


class Constraint:
    """Where one answer stands in its grammar.

    Args:
        matcher: the library's, at the beginning; it is used up.
        vocab_size: of the model's output.
        mask_bits: tokens that the library writes masks for, at least `vocab_size`.
    """

    def __init__(self, matcher: Any, *, vocab_size: int, mask_bits: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask_W = np.zeros((mask_bits + 31) // 32, dtype=np.int32)
        self._taken: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go to where the answer `token_ids` ends, from wherever this stands; cheap when few tokens differ.

        Raises:
            RequestError: the answer is not allowed by the grammar, or a limit was exceeded on the way.
        """
        common = len(self._taken)
        if self._taken != token_ids[:common]:
            same = [mine == asked for mine, asked in zip(self._taken, token_ids)]
            common = same.index(False) if False in same else len(same)
            if not self._matcher.rollback(len(self._taken) - common):
                raise self._failure()
            del self._taken[common:]
        fresh = list(token_ids[common:])
        if fresh:
            if not self._matcher.consume_tokens(fresh):
                raise self._failure()
            self._taken += fresh

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: uint8 (V,), 1 or 0. At the grammar's end, only those that end an answer may.

        Raises:
            RequestError: no token may come next, or a limit was exceeded.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask_W.ctypes.data, self._mask_W.nbytes)
        allowed_V = np.unpackbits(self._mask_W.view(np.uint8), count=self._vocab_size, bitorder="little")
        if self._matcher.is_error() or not allowed_V.any():
            raise self._failure()
        return allowed_V

    @property
    def satisfied(self) -> bool:
        """True when the answer may end here."""
        return bool(self._matcher.is_accepting())

    def _failure(self) -> RequestError:
        reason = _first_line(self._matcher.get_error()) or "no token may come next"
        return RequestError(f"the answer cannot follow its constraint any further: {reason}")


class GrammarCompiler:
    """Compiles the constraints of one engine's requests.

    Args:
        tokenizer: the engine's; answers cannot be constrained without one, or with one that the library does not know.
        vocab_size: of the model's output.
        end_ids: tokens that end an answer.
        compile_timeout_s: longest that a request waits for its grammar.
        cache_size: compiled grammars (and refusals) that are kept.
    """

    def __init__(
        self,
        tokenizer: object,
        *,
        vocab_size: int,
        end_ids: frozenset[int],
        compile_timeout_s: float = 5.0,
        cache_size: int = 64,
    ) -> None:
        self.compile_timeout_s = compile_timeout_s
        self.cache_size = cache_size
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(token_id for token_id in end_ids if token_id < vocab_size)
        self._tokens: Any = None  # the tokenizer as the library holds it
        self._compiled: OrderedDict[tuple[ConstraintKind, str], Any] = OrderedDict()
        self._compiling: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, kind: ConstraintKind, text: str) -> Constraint:
        """A constraint at the beginning of an answer; may be called from several threads.

        Raises:
            MissingExtraError: llguidance is not installed (extra constrained).
            RequestError: the text is at fault or too costly, or this model's tokenizer cannot be constrained.
        """
        with self._lock:
            matcher = self._compiled.get((kind, text))
            if matcher is not None:
                self._compiled.move_to_end((kind, text))
        if matcher is None:
            matcher = self._compile(kind, text)
        if isinstance(matcher, RequestError):
            raise RequestError(matcher.what, got=matcher.got, expected=matcher.expected, remedy=matcher.remedy)
        return Constraint(matcher.deep_copy(), vocab_size=self._vocab_size, mask_bits=self._tokens.vocab_size)

    def _compile(self, kind: ConstraintKind, text: str) -> Any:
        """Compile in a thread of its own, as the library cannot be stopped; its matcher, or the error to raise."""
        library = require("llguidance", extra="constrained")
        with self._lock:
            if self._tokens is None:
                self._tokens = self._library_tokenizer(library)
            self._compiling = [thread for thread in self._compiling if thread.is_alive()]
            if len(self._compiling) > _MAX_OVERDUE:
                raise RequestError(
                    f"the {_NAMES[kind]} cannot be compiled now", got="earlier ones that still run over their time"
                )
            done: list[Any] = []
            thread = threading.Thread(
                target=lambda: done.append(self._compile_and_keep(library, kind, text)), name="grammar", daemon=True
            )
            self._compiling.append(thread)
            thread.start()
        thread.join(self.compile_timeout_s)
        if not done:
            raise RequestError(
                f"the {_NAMES[kind]} takes too long to compile", expected=f"at most {self.compile_timeout_s:g} s"
            )
        return done[0]

    def _compile_and_keep(self, library: Any, kind: ConstraintKind, text: str) -> Any:
        try:
            result = _matcher(library, self._tokens, kind, text)
        except RequestError as error:
            result = error
        except BaseException as error:  # a panic of the library is no Exception
            reason = _first_line(str(error)) or type(error).__name__
            result = RequestError(f"the {_NAMES[kind]} cannot be compiled: {reason}", got=_short(text))
        with self._lock:
            self._compiled[kind, text] = result
            if len(self._compiled) > self.cache_size:
                self._compiled.popitem(last=False)
        return result

    def _library_tokenizer(self, library: Any) -> Any:
        backend = getattr(self._tokenizer, "backend", None)
        if not isinstance(backend, Backend):
            raise RequestError(
                "constrained output needs a tokenizer of the tokenizers library",
                got="none" if self._tokenizer is None else type(self._tokenizer).__name__,
                expected="a model folder with tokenizer.json",
            )
        if not self._end_ids:
            raise RequestError(
                "constrained output needs an end token, and the model names none",
                remedy="Set eos_token_id in the model's generation_config.json.",
            )
        plain: Any = Backend.from_str(backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        # A model's output may be wider than its tokenizer (padding) or narrower; the library wants room for all.
        size = max(self._vocab_size, 1 + max(plain.get_vocab(with_added_tokens=True).values(), default=0))
        try:
            return library.LLTokenizer(plain.to_str(), n_vocab=size, eos_token=self._end_ids)
        except ValueError as error:
            raise RequestError(
                f"answers of this model cannot be constrained, because of its tokenizer: {_first_line(str(error))}",
                expected="byte-level BPE, or sentencepiece with byte fallback",
            ) from error


def _matcher(library: Any, tokens: Any, kind: ConstraintKind, text: str) -> Any:
    limits = library.LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
    matcher = library.LLMatcher(tokens, _source(library, kind, text), log_level=0, limits=limits)
    if not matcher.is_error():
        # Some faults show only when the first token is asked for, such as a rule that is nothing but itself.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise RequestError(
            f"the {_NAMES[kind]} cannot be followed: {_first_line(matcher.get_error())}", got=_short(text)
        )
    return matcher


def _source(library: Any, kind: ConstraintKind, text: str) -> str:
    """The text in the library's own notation."""
    if kind == "regex":
        return library.LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        if text.lstrip().startswith("{"):
            raise RequestError("the grammar is JSON", expected="rules in Lark's notation, with a rule named start")
        return library.LLMatcher.grammar_from_lark(text)
    for multiple in _multiples(json.loads(text)):
        if isinstance(multiple, (int, float)) and _scaled(multiple) > _LARGEST_MULTIPLE:
            raise RequestError(
                "the JSON schema cannot be followed: multipleOf is too large",
                got=multiple,
                expected=f"at most {_LARGEST_MULTIPLE} (digits after the point count as well)",
            )
    return library.LLMatcher.grammar_from_json_schema(text, defaults=_JSON_STYLE)


def _multiples(schema: Any) -> Iterator[Any]:
    """Every value under a key "multipleOf", at any depth."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            if "multipleOf" in part:
                yield part["multipleOf"]
            pending += part.values()
        elif isinstance(part, list):
            pending += part


def _scaled(number: float) -> float:
    """The number without its decimal point: 0.25 is 25."""
    digits = repr(float(number)).split("e")[0].replace(".", "").strip("-0")
    return max(float(number), int(digits or 0))


def _first_line(message: str) -> str:
    """What a message of the library says, without its picture of where."""
    lines = [line.strip() for line in message.strip().split("\n")]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [*errors, lines[0]][0][:200]


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."
