from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from openai_server import Behaviour, serving

from burnish.engine.openai_engine import OpenAIEngine
from burnish.engine.protocol import make_engine
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, ConfigError, RequestError

SHORT = SamplingParams(max_tokens=3)


@pytest.fixture
def server() -> Behaviour:
    return Behaviour()


@pytest.fixture
def url(server: Behaviour) -> Iterator[str]:
    with serving(server) as address:
        yield address


def test_answers_come_in_order_with_text_and_counts(url: str) -> None:
    engine = make_engine("unused", engine=f"openai:{url}", max_num_seqs=2)
    outputs = list(engine.generate(["a", [5, 6], [{"role": "user", "content": "c"}]], SHORT))
    assert [output.text for output in outputs] == ["aé0 aé1 aé2 ", "2é0 2é1 2é2 ", "cé0 cé1 cé2 "]
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.prompt for output in outputs] == ["a", None, None]
    assert {output.finish_reason for output in outputs} == {"length"}
    assert outputs[0].metrics.prompt_tokens == 3
    assert outputs[0].metrics.output_tokens == 3
    assert outputs[0].choices[0].text == outputs[0].text


def test_requests_carry_what_was_asked_and_no_defaults(url: str, server: Behaviour) -> None:
    engine = OpenAIEngine(url)
    params = SamplingParams(
        max_tokens=2, temperature=0.5, top_p=0.9, seed=4, stop=("x",), logit_bias={7: 1.5}, frequency_penalty=0.25
    )
    list(engine.generate(["a"], params))
    list(engine.generate([[{"role": "user", "content": "b"}]], SHORT))
    first, second = server.requests
    assert first["path"] == "/v1/completions"
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 4, "stop": ["x"], "logit_bias": {"7": 1.5}, "max_tokens": 2}
    assert wanted.items() <= first.items()
    assert first["frequency_penalty"] == 0.25
    assert second["path"] == "/v1/chat/completions"
    assert not {"top_p", "seed", "stop", "ignore_eos", "logit_bias"} & set(second)


def test_stream_gives_each_piece_and_the_time_of_the_first(url: str, server: Behaviour) -> None:
    server.pause_s = 0.05
    events = list(OpenAIEngine(url).stream("a", SamplingParams(max_tokens=4)))
    assert [event.text for event in events] == ["aé0 ", "aé1 ", "aé2 ", "aé3 ", ""]
    output = events[-1].output
    assert output is not None
    assert output.text == "".join(event.text for event in events)
    assert output.metrics.ttft_ms is not None
    assert output.metrics.ttft_ms < output.metrics.e2e_ms - 100
    assert output.metrics.tpot_ms == pytest.approx(50, abs=40)


def test_no_more_requests_at_once_than_allowed(url: str, server: Behaviour) -> None:
    server.pause_s = 0.01
    outputs = list(OpenAIEngine(url, max_num_seqs=2).generate([str(n) for n in range(6)], SHORT))
    assert [output.text[0] for output in outputs] == list("012345")
    assert server.most_at_once == 2


def test_closing_ends_what_is_running_and_what_waits(url: str, server: Behaviour) -> None:
    server.pause_s = 0.02
    engine = OpenAIEngine(url, max_num_seqs=2)
    answers = engine.generate([str(n) for n in range(8)], SamplingParams(max_tokens=500))
    stream = engine.stream("a", SamplingParams(max_tokens=500))
    next(stream)
    started = time.perf_counter()
    stream.close()
    answers.close()
    assert time.perf_counter() - started < 5
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    # An iterator that was never begun sent nothing.
    assert len(server.requests) == 1


def test_closing_in_the_middle_does_not_wait_for_the_rest(url: str, server: Behaviour) -> None:
    server.pause_s = 0.02
    engine = OpenAIEngine(url, max_num_seqs=2)
    params = [SamplingParams(max_tokens=1)] + [SamplingParams(max_tokens=1000)] * 4
    answers = engine.generate(["a"] * 5, params)
    next(answers)
    started = time.perf_counter()
    answers.close()
    assert time.perf_counter() - started < 5
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_counts_fall_back_to_pieces_without_usage(url: str, server: Behaviour) -> None:
    server.usage = False
    (output,) = OpenAIEngine(url).generate(["a"], SHORT)
    assert (output.metrics.output_tokens, output.metrics.prompt_tokens) == (3, 0)


def test_ignore_eos_is_sent_and_checked(url: str, server: Behaviour) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    list(OpenAIEngine(url).generate(["a"], params))
    assert server.requests[0]["ignore_eos"] is True
    server.honours_ignore_eos = False
    with pytest.raises(RequestError, match="does not honour ignore_eos"):
        list(OpenAIEngine(url).generate(["a"], params))


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("status", RequestError, "answered 400: prompt is too long"),
        ("server", BurnishError, "answered 503"),
        ("plain", BurnishError, "does not stream"),
        ("error", BurnishError, "failed: out of memory"),
        ("cut", BurnishError, "broke off"),
        ("junk", BurnishError, "not JSON"),
    ],
)
def test_failures_are_one_line(
    url: str, server: Behaviour, failure: str, kind: type[BurnishError], message: str
) -> None:
    server.failure = failure
    engine = OpenAIEngine(url)
    for run in (lambda: list(engine.generate(["a"], SHORT)), lambda: list(engine.stream("a", SHORT))):
        with pytest.raises(kind, match=message) as caught:
            run()
        assert "\n" not in caught.value.message


def test_silence_is_an_error_in_time(url: str, server: Behaviour) -> None:
    server.pause_s = 1.0
    engine = OpenAIEngine(url, silence_s=0.1)
    with pytest.raises(BurnishError, match="did not answer in time"):
        list(engine.generate(["a"], SHORT))


def test_unreachable_servers_and_wrong_addresses_are_named(url: str, server: Behaviour) -> None:
    with pytest.raises(BurnishError, match=r"127\.0\.0\.1:1/v1 cannot be reached"):
        OpenAIEngine("http://127.0.0.1:1/v1")
    with pytest.raises(RequestError, match="answered 404"):
        OpenAIEngine(url.removesuffix("/v1"))
    server.failure = "models"
    with pytest.raises(BurnishError, match="not a list of models"):
        OpenAIEngine(url)
    for wrong in ("localhost:80", "ftp://here/v1", "http://", "http://here:port/v1"):
        with pytest.raises(ConfigError, match="malformed"):
            OpenAIEngine(wrong)


def test_the_model_is_the_only_one_or_the_one_named(url: str, server: Behaviour) -> None:
    assert OpenAIEngine(url).model == "tiny"
    assert OpenAIEngine(url).max_model_len == 64
    server.models = ("one", "two")
    assert OpenAIEngine(f"{url}#two").model == "two"
    with pytest.raises(ConfigError, match="serves 2 models"):
        OpenAIEngine(url)
    with pytest.raises(ConfigError, match="does not serve three"):
        OpenAIEngine(f"{url}#three")


@pytest.mark.parametrize(
    "params", [SamplingParams(top_k=2, temperature=1.0), SamplingParams(min_tokens=2), SamplingParams(n=2)]
)
def test_parameters_beyond_the_protocol_are_refused_before_anything_is_sent(
    url: str, server: Behaviour, params: SamplingParams
) -> None:
    with pytest.raises(RequestError, match="does not know"):
        OpenAIEngine(url).generate(["a"], params)
    assert server.requests == []


def test_the_key_is_sent_only_where_it_is_set(url: str, server: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    list(OpenAIEngine(url).generate(["a"], SHORT))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    list(OpenAIEngine(url).generate(["a"], SHORT))
    assert "authorization" not in server.headers[0]
    assert server.headers[1]["authorization"] == "Bearer secret"


def test_warm_up_and_stats_say_what_a_client_knows(url: str) -> None:
    engine = OpenAIEngine(url)
    assert engine.warm_up() > 0
    stats = engine.stats()
    assert (stats.engine, stats.device, stats.dtype, stats.weights_bytes) == ("openai", url, "", 0)
