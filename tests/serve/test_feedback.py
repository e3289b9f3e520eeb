"""Labels of answers: what is counted, what is refused, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest
from serving_process import BASE, ServingProcess, events_of

from burnish.engine.sampling import SamplingParams
from burnish.serve import feedback as labelling
from burnish.serve.faults import Fault
from burnish.serve.feedback import Feedback
from burnish.serve.jobs import Answer, Job


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "kind": "chat", "model": "m", "adapter": None, "fingerprint": "fp", "prompts": [], "params": SamplingParams(),
        "stream": False,
    }  # fmt: skip
    return Job(**{**fields, **changes})


def answered(feedback: Feedback, texts: list[str], **changes: Any) -> str:
    """An answer that has ended; its id."""
    made = job(**changes)
    answer = Answer(0, 0, texts=texts, finish_reason="stop")
    feedback.on_answer(made, answer, 0.1)
    return made.answer_id


def samples(feedback: Feedback) -> dict[tuple[str, ...], float]:
    found = [sample for family in feedback.collect() for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def test_labels_give_counts_and_an_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "RECENT_LABELS", 4)
    feedback = Feedback()
    for number in range(6):
        feedback.label(answered(feedback, ["x"]), 0, correct=number >= 3, expected=None)
    found = samples(feedback)
    assert found["burnish_feedback_total", "m", "true"] == 3
    assert found["burnish_feedback_total", "m", "false"] == 3
    assert found["burnish_feedback_accuracy", "m"] == 3 / 4, "of the last four"


def test_expected_text_is_right_but_for_white_space() -> None:
    feedback = Feedback()
    one, other = answered(feedback, ["SELECT ", " 1\n"]), answered(feedback, ["SELECT 2"])
    assert feedback.label(one, 0, correct=None, expected="SELECT 1").correct
    assert not feedback.label(other, 0, correct=None, expected="SELECT 1").correct


def test_label_counts_once_and_cannot_turn() -> None:
    feedback = Feedback()
    one = answered(feedback, ["a"])
    assert feedback.label(one, 0, correct=True, expected=None).counted
    assert not feedback.label(one, 0, correct=True, expected=None).counted
    with pytest.raises(Fault, match="opposite"):
        feedback.label(one, 0, correct=False, expected=None)
    assert samples(feedback)["burnish_feedback_total", "m", "true"] == 1


def test_only_the_newest_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "MOST_ANSWERS", 2)
    feedback = Feedback()
    first = answered(feedback, ["a"])
    others = [answered(feedback, ["b"]) for _ in range(2)]
    with pytest.raises(Fault) as caught:
        feedback.label(first, 0, correct=True, expected=None)
    assert caught.value.status == 404
    for other in others:
        feedback.label(other, 0, correct=True, expected=None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_answers_of_a_server_are_labelled_by_their_id(server: ServingProcess, kind: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": BASE, "max_tokens": 4, "n": 2, "seed": 1, "stream": stream}
    body |= {"prompt": "a"} if kind == "completion" else {"messages": [{"role": "user", "content": "a"}]}
    path = "/v1/completions" if kind == "completion" else "/v1/chat/completions"
    reply = server.post(path, body)
    answer_id = events_of(reply.text)[0]["id"] if stream else reply.json()["id"]
    before = server.metrics()
    label = {"id": answer_id, "index": 1, "correct": True}
    first = server.post("/v1/feedback", label).json()
    assert first == {**label, "model": BASE, "counted": True}
    assert server.post("/v1/feedback", label).json()["counted"] is False
    name = f'burnish_feedback_total{{correct="true",model="{BASE}"}}'
    assert server.metrics()[name] - before.get(name, 0) == 1
    if not stream:
        choice = reply.json()["choices"][0]
        text = choice["text"] if kind == "completion" else choice["message"]["content"]
        told = server.post("/v1/feedback", {"id": answer_id, "expected": f" {text} "}).json()
        assert told["correct"] is True
    assert 0 < server.metrics()[f'burnish_feedback_accuracy{{model="{BASE}"}}'] <= 1


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"id": "cmpl-none", "correct": True}, 404, "id"),
        ({"id": "cmpl-none"}, 400, "correct"),
        ({"id": "cmpl-none", "correct": True, "expected": "a"}, 400, "correct"),
        ({"correct": True}, 400, "id"),
        ({"id": "", "correct": True}, 400, "id"),
        ({"id": "a", "correct": 1}, 400, "correct"),
        ({"id": "a", "correct": True, "index": -1}, 400, "index"),
        ({"id": "a", "correct": True, "score": 1}, 400, "score"),
    ],
)
def test_labels_at_fault_are_refused(server: ServingProcess, body: dict[str, Any], status: int, param: str) -> None:
    reply = server.post("/v1/feedback", body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == param


def test_route_is_declared(server: ServingProcess) -> None:
    operation = server.get("/openapi.json").json()["paths"]["/v1/feedback"]["post"]
    assert set(operation["responses"]) == {"200", "400", "404", "408", "413", "503"}
