"""What was asked before, as a browser keeps it. It comes back from there, so nothing in it is believed unchecked."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from burnish.errors import RequestError
from burnish.serve.compare_answers import AnswerState
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked, from_query, to_query

MAX_ENTRIES = 20
_MAX_TEXT_CHARS = 4_000
_MAX_ANSWERS = 16


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """One prompt and what the models answered.

    Attributes:
        at: seconds since 1970.
        answers: by the digest of the model's weights, so that they are only ever shown as that model's.
    """

    at: float
    asked: Asked
    answers: dict[str, AnswerState]


def remember(
    kept: Any, asked: Asked, models: Sequence[ComparedModel], states: Sequence[AnswerState]
) -> list[dict[str, Any]]:
    """The history with one more entry, newest first; the same prompt and settings are kept once."""
    try:
        query = to_query(asked)
    except RequestError:
        return entries(kept)  # too long to keep
    answers = {
        model.digest: {
            "text": state.text[:_MAX_TEXT_CHARS],
            "prompt_tokens": state.prompt_tokens,
            "num_tokens": state.num_tokens,
            "ttft_s": state.ttft_s,
            "answering_s": state.answering_s,
            "finish_reason": state.finish_reason,
        }
        for model, state in zip(models, states)
        if state.status == "done"
    }
    entry = {"at": time.time(), "query": query, "answers": answers}
    return [entry, *[each for each in entries(kept) if each["query"] != query]][:MAX_ENTRIES]


def entries(kept: Any) -> list[dict[str, Any]]:
    """Those entries of what a browser sent that have the right form."""
    if not isinstance(kept, list):
        return []
    return [each for each in kept[:MAX_ENTRIES] if read_entry(each) is not None]


def read_entry(kept: Any) -> Remembered | None:
    """One entry; None where it is not one."""
    if not isinstance(kept, dict) or not isinstance(kept.get("query"), str) or not _is_number(kept.get("at")):
        return None
    asked, complaints = from_query(dict(parse_qsl(kept["query"], keep_blank_values=True)))
    answers = kept.get("answers")
    if complaints or not isinstance(answers, dict) or len(answers) > _MAX_ANSWERS:
        return None
    found: dict[str, AnswerState] = {}
    for digest, answer in answers.items():
        state = _state_of(answer)
        if state is None:
            return None
        found[str(digest)] = state
    return Remembered(at=float(kept["at"]), asked=asked, answers=found)


def _state_of(answer: Any) -> AnswerState | None:
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        return None
    numbers = [answer.get(name) for name in ("prompt_tokens", "num_tokens", "answering_s")]
    if not all(_is_number(number) for number in numbers):
        return None
    ttft_s, reason = answer.get("ttft_s"), answer.get("finish_reason")
    if (ttft_s is not None and not _is_number(ttft_s)) or reason not in ("stop", "length"):
        return None
    return AnswerState(
        status="done",
        text=answer["text"][:_MAX_TEXT_CHARS],
        prompt_tokens=int(answer["prompt_tokens"]),
        num_tokens=int(answer["num_tokens"]),
        ttft_s=ttft_s,
        answering_s=float(answer["answering_s"]),
        finish_reason=reason,
    )


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1e12
    )
