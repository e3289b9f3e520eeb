"""`burnish serve --ray local`: two replicas, OpenAI's client, a replica that dies, an end that lets streams end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_process import BASE, ServingProcess

pytest.importorskip("ray", reason="the extra ray brings it")
openai: Any = pytest.importorskip("openai", reason="the extra dev brings it")

pytestmark = pytest.mark.slow
KEY = "a-key-for-tests"
OPTIONS = {"model": BASE, "messages": [{"role": "user", "content": "How many rows are there?"}], "temperature": 0}


@pytest.fixture(scope="module")
def served(_own_cache: None) -> Iterator[ServingProcess]:
    environment = {"BURNISH_API_KEYS": KEY}
    running = ServingProcess("--ray", "local", "--replicas", "2", "--grace", "120", environment=environment)
    with running:
        yield running


@pytest.fixture
def client(served: ServingProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0, timeout=300) as opened:
        yield opened


def wait_until(true: Callable[[], Any], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.1)


def ready(served: ServingProcess) -> int:
    return served.get("/ready").json()["replicas"]["ready"]


def replicas(served: ServingProcess) -> list[psutil.Process]:
    children = psutil.Process(served.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:burnish:" in child.name() + " ".join(child.cmdline())]


def test_streams_through_ray_are_what_a_whole_answer_is(served: ServingProcess, client: Any) -> None:
    assert served.record["replicas"] == 2
    whole = client.chat.completions.create(**OPTIONS, max_tokens=40)
    for _ in range(4):  # whichever replica answers
        chunks = list(client.chat.completions.create(**OPTIONS, max_tokens=40, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert len(chunks) > 2
    assert [model.id for model in client.models.list()] == [BASE]


def test_keys_are_asked_for_everywhere_but_health_and_ready(served: ServingProcess) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        assert served.get(path).status_code == 401
    wrong = served.post("/v1/completions", {}, headers={"Authorization": "Bearer another"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/health", "/ready"):
        reply = served.get(path)
        assert (reply.status_code, reply.json()["replicas"]["wanted"]) == (200, 2)


def test_metrics_say_whose_they_are(served: ServingProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}

    def whose() -> set[str]:
        lines = served.get("/metrics", headers=headers).text.splitlines()
        return {line.partition("}")[0] for line in lines if line.startswith("burnish_engine_up{")}

    wait_until(lambda: len(whose()) == 2)
    paths = served.get("/openapi.json", headers=headers).json()["paths"]
    assert "/v1/chat/completions" in paths
    missing = served.get("/nothing", headers=headers)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_client_that_leaves_frees_its_place(served: ServingProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": BASE, "prompt": "CREATE TABLE", "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": True}

    def total(name: str, label: str = "") -> float:
        lines = served.get("/metrics", headers=headers).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{") and label in line)

    with httpx.stream("POST", f"{served.url}/completions", json=body, headers=headers, timeout=300) as stream:
        next(stream.iter_lines())
    wait_until(lambda: total("burnish_requests_total", 'outcome="gone"') == 1)
    wait_until(lambda: total("burnish_admitted_answers") == 0)


def test_replica_that_dies_is_replaced_while_the_other_answers(served: ServingProcess, client: Any) -> None:
    wait_until(lambda: ready(served) == 2)
    [first, _] = replicas(served)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: ready(served) == 1)
    assert served.get("/ready").status_code == 200
    assert client.chat.completions.create(**OPTIONS, max_tokens=5).usage.completion_tokens > 0
    wait_until(lambda: ready(served) == 2)


def test_sigterm_lets_a_stream_end_and_leaves_no_process(served: ServingProcess, tmp_path: Path) -> None:
    """The last one: it ends the server."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": BASE, "prompt": "CREATE TABLE", "max_tokens": 300, "ignore_eos": True, "stream": True}
    everything = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
    begun, lines = threading.Event(), []

    def ask() -> None:
        with httpx.stream("POST", f"{served.url}/completions", json=body, headers=headers, timeout=300) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                begun.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(300)
    served.process.send_signal(signal.SIGTERM)
    code, said = served.ended()
    asking.join(60)
    assert code == 0, said
    assert lines[-2:] == ["data: [DONE]", ""]
    last = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")][-1]
    assert last["choices"][0]["finish_reason"] == "length"
    _, alive = psutil.wait_procs(everything, timeout=60)
    assert not alive
