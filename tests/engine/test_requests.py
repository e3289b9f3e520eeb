"""Requests are checked against the model's limits before anything runs."""

from __future__ import annotations

import pytest

from burnish.engine.requests import RequestFactory
from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError


@pytest.fixture
def requests() -> RequestFactory:
    return RequestFactory(None, vocab_size=50, max_model_len=20, end_ids=frozenset({2}))


def test_bias_outside_the_vocabulary_is_refused(requests: RequestFactory) -> None:
    assert requests.make([7], SamplingParams(logit_bias={49: 1})).params.biases == ((49, 1.0),)
    with pytest.raises(RequestError, match="token of logit_bias is outside the vocabulary; got 50"):
        requests.make([7], SamplingParams(logit_bias={3: 1, 50: 1}))


def test_stop_token_outside_the_vocabulary_is_refused(requests: RequestFactory) -> None:
    with pytest.raises(RequestError, match="stop token is outside the vocabulary; got 50"):
        requests.make([7], SamplingParams(stop_token_ids=[50]))


def test_several_answers_are_several_sequences(requests: RequestFactory) -> None:
    params = SamplingParams(n=3, temperature=1.0)
    sequences = requests.make_choices([7, 8], params, index=5)
    assert [(one.choice, one.index) for one in sequences] == [(0, 5), (1, 5), (2, 5)]
    assert len({one.request_id for one in sequences}) == 3
    assert len({id(one.text) for one in sequences}) == 3
    with pytest.raises(RequestError, match="only one answer can be produced here; got n=3"):
        requests.make([7, 8], params)
