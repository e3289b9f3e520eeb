"""What a browser keeps of earlier prompts, and that what it sends back is not believed unchecked."""

from __future__ import annotations

from typing import Any

import faulty_engines
import pytest
from serving_parts import service_over

from burnish.serve.compare_answers import AnswerState
from burnish.serve.compare_history import MAX_ENTRIES, entries, read_entry, remember
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked, asked_of
from burnish.serve.compare_samples import samples

GOOD = {
    "at": 1e9,
    "query": "q=hello&seed=7",
    "answers": {
        "ab": {
            "text": "SELECT 1",
            "prompt_tokens": 5,
            "num_tokens": 3,
            "ttft_s": 0.1,
            "answering_s": 0.2,
            "finish_reason": "stop",
        }
    },
}


@pytest.fixture(scope="module")
def models() -> list[ComparedModel]:
    service = service_over(faulty_engines.plain)
    of_it: Any = {"model": service.served.models[0], "service": service, "template": "chat"}
    return [ComparedModel(name=name, digest=name * 32, **of_it) for name in ("ab", "cd")]


def test_a_prompt_comes_back_with_its_answers_by_their_weights(models: list[ComparedModel]) -> None:
    asked = asked_of(samples()[3])
    well = AnswerState(status="done", text="SELECT 1", num_tokens=3, ttft_s=0.5, answering_s=1.0, finish_reason="stop")
    kept = remember([], asked, models, [well, AnswerState(status="stopped", text="SEL")])
    remembered = read_entry(kept[0])
    assert remembered is not None
    assert remembered.asked == asked
    [(digest, state)] = remembered.answers.items()
    assert digest == models[0].digest
    assert (state.status, state.text, state.tokens_per_s) == ("done", "SELECT 1", 2.0)


def test_the_same_prompt_is_kept_once_and_old_ones_go(models: list[ComparedModel]) -> None:
    states = [AnswerState(), AnswerState()]
    kept: list[Any] = []
    for number in range(MAX_ENTRIES + 5):
        kept = remember(kept, Asked(question=f"question {number}"), models, states)
    kept = remember(kept, Asked(question="question 10"), models, states)
    shown = [entry.asked.question for each in kept if (entry := read_entry(each)) is not None]
    assert len(shown) == MAX_ENTRIES
    assert shown[0] == "question 10"
    assert len(set(shown)) == len(shown)
    too_long = Asked(question="ä" * 5_000)
    assert remember(kept, too_long, models, states) == kept


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "text",
        {},
        {**GOOD, "at": "now"},
        {**GOOD, "at": float("nan")},
        {**GOOD, "query": 7},
        {**GOOD, "query": "tokens=many"},
        {**GOOD, "answers": []},
        {**GOOD, "answers": {str(number): GOOD["answers"]["ab"] for number in range(17)}},  # type: ignore[index]
        {**GOOD, "answers": {"ab": "SELECT 1"}},
        {**GOOD, "answers": {"ab": {**GOOD["answers"]["ab"], "text": None}}},  # type: ignore[index]
        {**GOOD, "answers": {"ab": {**GOOD["answers"]["ab"], "ttft_s": "soon"}}},  # type: ignore[index]
        {**GOOD, "answers": {"ab": {**GOOD["answers"]["ab"], "num_tokens": -1}}},  # type: ignore[index]
        {**GOOD, "answers": {"ab": {**GOOD["answers"]["ab"], "finish_reason": "<b>"}}},  # type: ignore[index]
    ],
)
def test_what_is_no_entry_is_passed_over(kept: Any) -> None:
    assert read_entry(GOOD) is not None
    assert read_entry(kept) is None
    assert entries([kept, GOOD]) == [GOOD]
    assert entries(kept) == []
