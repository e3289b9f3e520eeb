"""Whatever the model prefers, constrained answers follow; whatever is asked, nothing hangs and nothing is ignored."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.engine import constrained
from burnish.engine.constrained import Constraint, GrammarCompiler
from burnish.engine.requests import RequestFactory
from burnish.engine.sampler import Sampler
from burnish.engine.sampling import ConstraintKind, SamplingParams
from burnish.engine.sequence import Sequence
from burnish.errors import BurnishError, MissingExtraError, RequestError

pytest.importorskip("llguidance", reason="needs the extra constrained")

PADDING = 28  # the model's vocabulary is wider than the tokenizer's

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
}
GRAMMAR = """
start: sum
sum: product (("+" | "-") product){0,2}
product: atom (("*" | "/") atom){0,2}
atom: NUMBER | "(" NUMBER ")"
NUMBER: /[1-9][0-9]{0,3}/
"""
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"


def check_schema(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags", "more"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"red", "green", "blue"}
    assert len(value["tags"]) <= 3
    assert value["more"] in (None, True, False)


def check_grammar(text: str) -> None:
    atom = r"(?:[1-9]\d{0,3}|\([1-9]\d{0,3}\))"
    product = rf"{atom}(?:[*/]{atom}){{0,2}}"
    assert re.fullmatch(rf"{product}(?:[+-]{product}){{0,2}}", text)


def check_date(text: str) -> None:
    assert re.fullmatch(DATE, text)


def check_free(text: str) -> None:
    pass


ASKED: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"json_schema": SCHEMA}, check_schema),
    ({"regex": DATE}, check_date),
    ({"grammar": GRAMMAR}, check_grammar),
    ({}, check_free),
    ({"json_schema": SCHEMA, "temperature": 0.0}, check_schema),
    ({"regex": DATE, "frequency_penalty": 0.5, "top_p": 0.9}, check_date),
    ({"temperature": 0.0}, check_free),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_path("burnish-sql-base"))


@pytest.fixture(scope="module")
def requests(tokenizer: Tokenizer) -> RequestFactory:
    return make_requests(tokenizer)


def make_requests(tokenizer: Tokenizer) -> RequestFactory:
    return RequestFactory(
        tokenizer, vocab_size=tokenizer.vocab_size + PADDING, max_model_len=2000, end_ids=tokenizer.eos_ids
    )


def random_logits(sequence: Sequence, vocabulary: int) -> torch.Tensor:
    """A model without sense: logits (V,) that depend on the answer's last two tokens and on its length."""
    context = (*sequence.token_ids[-2:], len(sequence.token_ids))
    return 2.0 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(hash(context)))


def run(sequences: list[Sequence], vocabulary: int) -> list[str]:
    """Decode all to their ends, those that go on as one batch; their texts."""
    sampler = Sampler()
    while running := [sequence for sequence in sequences if not sequence.finished]:
        logits_BV = torch.stack([random_logits(sequence, vocabulary) for sequence in running])
        for sequence, sampled in zip(running, sampler.sample(logits_BV, running)):
            assert sampled.failure is None
            sequence.append(sampled.token_id, now_s=0.0)
    return [sequence.text.text for sequence in sequences]


def ask(requests: RequestFactory, seed: int, **asked: Any) -> Sequence:
    return requests.make([7], SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 300, **asked}))


@pytest.mark.parametrize("seed", range(4))
def test_answers_of_a_mixed_batch_follow_and_end(seed: int, requests: RequestFactory, tokenizer: Tokenizer) -> None:
    sequences = [ask(requests, seed + row, **asked) for row, (asked, _) in enumerate(ASKED)]
    texts = run(sequences, requests.vocab_size)
    for (asked, check), sequence, text in zip(ASKED, sequences, texts):
        check(text)
        if sequence.constraint is not None:
            assert sequence.finish_reason == "stop"
            assert sequence.token_ids[-1] in tokenizer.eos_ids
        [alone] = run([ask(requests, sequence.params.seed or 0, **asked)], requests.vocab_size)
        assert alone == text


@pytest.mark.parametrize(
    "folder", ["models/stories260k", "tokenizers/gpt2", "tokenizers/gpt-neox", "tokenizers/mistral-v1"]
)
def test_real_tokenizers_can_be_constrained(folder: str, shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / folder)
    ends = tokenizer.eos_ids or {0}
    requests = RequestFactory(tokenizer, vocab_size=tokenizer.vocab_size, max_model_len=2000, end_ids=frozenset(ends))
    for asked, check in ASKED[:3]:
        one = ask(requests, 3, **asked)
        run([one], requests.vocab_size)
        assert one.finish_reason == "stop"
        text = tokenizer.decode([7, *one.token_ids[:-1]]).removeprefix(tokenizer.decode([7]))
        check(text)


def test_other_scripts_and_unfinished_characters_stay_valid(requests: RequestFactory) -> None:
    for seed in range(5):
        [text] = run([ask(requests, seed, regex=r"[\u4e00-\u4eff]{2}é😀")], requests.vocab_size)
        assert re.fullmatch(r"[\u4e00-\u4eff]{2}é😀", text)


def test_numbers_missing_where_the_mask_bans_are_still_an_error(requests: RequestFactory) -> None:
    logits_BV = torch.zeros((1, requests.vocab_size))
    logits_BV[0, 0] = math.nan
    with pytest.raises(BurnishError, match="not numbers"):
        Sampler().sample(logits_BV, [ask(requests, 0, regex=DATE)])


def test_answer_cut_by_max_tokens_ends_with_length(requests: RequestFactory) -> None:
    one = ask(requests, 0, regex="[ab]{100}", max_tokens=5)
    run([one], requests.vocab_size)
    assert one.finish_reason == "length"
    assert one.constraint is not None
    assert not one.constraint.satisfied


def test_only_end_tokens_are_allowed_at_the_end(requests: RequestFactory, tokenizer: Tokenizer) -> None:
    constraint = requests.make([7], SamplingParams(regex="ab")).constraint
    assert constraint is not None
    constraint.follow(tokenizer.encode("ab"))
    assert constraint.satisfied
    assert set(np.flatnonzero(constraint.allowed()).tolist()) == set(tokenizer.eos_ids)


def test_padding_of_the_vocabulary_and_special_tokens_are_never_allowed(
    requests: RequestFactory, tokenizer: Tokenizer
) -> None:
    constraint = requests.make([7], SamplingParams(regex=r"(?s:.*)")).constraint
    assert constraint is not None
    allowed_V = constraint.allowed()
    assert allowed_V.shape == (tokenizer.vocab_size + PADDING,)
    assert allowed_V[tokenizer.vocab_size :].sum() == 0
    specials = tokenizer.special_ids - tokenizer.eos_ids
    assert specials
    assert allowed_V[sorted(specials)].sum() == 0
    assert allowed_V.sum() > 0.9 * tokenizer.vocab_size


def test_model_narrower_than_its_tokenizer_is_masked_to_its_size(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=300, end_ids=tokenizer.eos_ids)
    assert compiler.start("regex", r"[a-z]+").allowed().shape == (300,)
    with pytest.raises(RequestError, match="no token may come next"):
        GrammarCompiler(tokenizer, vocab_size=6, end_ids=tokenizer.eos_ids).start("regex", "zebra").allowed()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_state_follows_any_answer(data: st.DataObject, requests: RequestFactory, tokenizer: Tokenizer) -> None:
    """Forwards, backwards and aside: the same mask as one that went there directly."""

    def fresh() -> Constraint:
        constraint = requests.make([7], SamplingParams(grammar=GRAMMAR)).constraint
        assert constraint is not None
        return constraint

    wanderer = fresh()
    texts = ["12+3*4", "12+(77)", "12*9/8-5", "1", "", "(4)*(5)-6", "12"]
    for text in data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=6)):
        answer = tokenizer.encode(text)
        wanderer.follow(answer)
        direct = fresh()
        direct.follow(answer)
        assert np.array_equal(wanderer.allowed(), direct.allowed())


@given(seed=st.integers(0, 30), data=st.data())
@settings(max_examples=15, deadline=None)
def test_drafts_do_not_change_constrained_answers(seed: int, data: st.DataObject, requests: RequestFactory) -> None:
    kinds = data.draw(st.sampled_from([ASKED[0][0], ASKED[1][0], ASKED[2][0], ASKED[5][0]]))
    plain, drafted = ask(requests, seed, **kinds), ask(requests, seed, **kinds)
    run([plain], requests.vocab_size)
    sampler = Sampler()
    while not drafted.finished:
        at = len(drafted.token_ids)
        right = data.draw(st.integers(0, 4))
        drafts = [*plain.token_ids[at : at + right], *data.draw(st.lists(st.integers(0, 3000), max_size=2))]
        rows = []
        for place in range(len(drafts) + 1):
            ahead = ask(requests, seed)
            ahead.token_ids = [*drafted.token_ids, *drafts[:place]]
            rows.append(random_logits(ahead, requests.vocab_size))
        for sampled in sampler.verify(torch.stack(rows), drafts, drafted):
            if not drafted.finished:
                drafted.append(sampled.token_id, now_s=0.0)
    assert drafted.token_ids == plain.token_ids


def test_grammar_that_explodes_fails_alone(requests: RequestFactory) -> None:
    """The limit of a step is reached while decoding: that sequence ends with a reason, its neighbour goes on."""
    bomb = ask(requests, 0, regex="((a{1,1000}){1,1000}){1,1000}")
    free = ask(requests, 0)
    sampler = Sampler()
    for _ in range(50):
        logits_BV = torch.zeros((2, requests.vocab_size))
        found = sampler.sample(logits_BV, [bomb, free])
        assert found[1].failure is None
        if found[0].failure is not None:
            assert found[0].token_id == -1
            assert "cannot follow its constraint" in found[0].failure.message
            return
        for sequence, sampled in zip((bomb, free), found):
            sequence.token_ids.append(sampled.token_id)
    pytest.fail("the limit was not reached")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(a", "followed: unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("grammar", "hello", "Expected token"),
        ("grammar", "start: missing", "unknown name"),
        ("grammar", "begin: /a/", "start"),
        ("grammar", "start: start", "cannot be followed"),
        ("grammar", "start: /(/", "followed: unclosed group"),
        ("grammar", '{"grammars": []}', "Lark"),
        ("json_schema", {"type": "foo"}, "foo"),
        ("json_schema", {"not": {"type": "integer"}}, "not"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ("json_schema", {"$ref": "https://example.com/schema.json"}, "example.com"),
        ("json_schema", {"$ref": "#"}, "cannot be followed"),
        ("json_schema", {"items": [{"multipleOf": 999983}]}, "multipleOf is too large"),
        ("json_schema", {"multipleOf": 0.100001}, "multipleOf is too large"),
        ("json_schema", {"multipleOf": 1e300}, "multipleOf is too large"),
    ],
)
def test_text_that_cannot_be_followed_is_refused_in_one_line(
    kind: ConstraintKind, text: Any, message: str, requests: RequestFactory
) -> None:
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RequestError, match=re.escape(message)) as caught:
            requests.make([7], SamplingParams(**{kind: text}))
        assert len(str(caught.value)) < 500


def test_allowed_multiples_are_followed(requests: RequestFactory) -> None:
    schema = {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 99}
    [text] = run([ask(requests, 2, json_schema=schema)], requests.vocab_size)
    assert float(text) * 4 == int(float(text) * 4)


def test_json_has_one_style_of_white_space(requests: RequestFactory, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}}
    for text, taken in (("[1,2]", True), ("[1, 2]", True), ("[ 1", False), ("[1,  2", False), ("[1,\n", False)):
        one = ask(requests, 0, json_schema=schema).constraint
        assert one is not None
        with nullcontext() if taken else pytest.raises(RequestError):
            one.follow([token for letter in text for token in tokenizer.encode(letter)])


def test_compiling_that_takes_too_long_is_given_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(
        tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids, compile_timeout_s=0.05
    )
    compiler.start("regex", "warm")
    quick = constrained._matcher
    may_compile = threading.Event()

    def slow(library: Any, tokens: Any, kind: ConstraintKind, text: str) -> Any:
        assert text == "quick" or may_compile.wait(60)
        return quick(library, tokens, kind, text)

    monkeypatch.setattr(constrained, "_matcher", slow)
    for text in ("a", "b", "c"):
        with pytest.raises(RequestError, match="takes too long to compile"):
            compiler.start("regex", text)
    with pytest.raises(RequestError, match="cannot be compiled now"):
        compiler.start("regex", "quick")
    assert len(compiler._compiled) == 1  # nobody waited for the compiler
    may_compile.set()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(compiler._compiled) < 4:
        time.sleep(0.01)
    # What came too late is kept, so that asking again pays.
    assert compiler.start("regex", "a").allowed().any()
    assert compiler.start("regex", "quick").allowed().any()


def test_failure_inside_the_library_is_a_request_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def fail(*_: Any) -> Any:
        raise Panic("index out of bounds\nbacktrace")

    monkeypatch.setattr(constrained, "_matcher", fail)
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids)
    with pytest.raises(RequestError, match="regular expression cannot be compiled: index out of bounds;"):
        compiler.start("regex", "a")


def test_compiled_grammars_are_kept_up_to_a_number(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = constrained._matcher

    def counting(library: Any, tokens: Any, kind: ConstraintKind, text: str) -> Any:
        compiled.append(text)
        return original(library, tokens, kind, text)

    monkeypatch.setattr(constrained, "_matcher", counting)
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=tokenizer.eos_ids, cache_size=2)
    for text in "aabacab":
        compiler.start("regex", text)
    assert "".join(compiled) == "abcb"


def test_missing_library_names_the_extra(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"burnish\[constrained\]"):
        make_requests(tokenizer).make([7], SamplingParams(regex="a"))


@pytest.mark.parametrize("other", [None, object()])
def test_tokenizer_of_another_kind_is_refused(other: Any) -> None:
    requests = RequestFactory(other, vocab_size=50, max_model_len=100, end_ids=frozenset({1}))
    with pytest.raises(RequestError, match="needs a tokenizer of the tokenizers library"):
        requests._grammars.start("regex", "a")


def test_model_without_an_end_token_is_refused(tokenizer: Tokenizer) -> None:
    requests = RequestFactory(tokenizer, vocab_size=4000, max_model_len=100, end_ids=frozenset({5000}))
    with pytest.raises(RequestError, match="needs an end token"):
        requests.make([7], SamplingParams(regex="a"))


def test_choices_of_one_request_walk_alone(requests: RequestFactory) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=3, regex=DATE, max_tokens=100)
    sequences = requests.make_choices([7], params)
    texts = run(sequences, requests.vocab_size)
    for text in texts:
        check_date(text)
    assert len(set(texts)) > 1
    assert [sequence.choice for sequence in sequences] == [0, 1, 2]
