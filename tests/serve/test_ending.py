"""Signals: the first lets what runs end, the second does not wait; nothing of the server stays behind."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import httpx
import psutil
import pytest
from serving_process import BASE, ServingProcess, events_of

LONG = {
    "model": BASE,
    "prompt": "CREATE TABLE",
    "max_tokens": 1000,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
# Many streams with heavy steps run for seconds, so that the signals find them running.
HEAVY = {**LONG, "n": 16, "logprobs": 20, "max_tokens": 400}


def in_background(server: ServingProcess, body: dict[str, Any]) -> tuple[threading.Thread, list[str]]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body).text))
    thread.start()
    server.wait_for("burnish_admitted_answers", body.get("n", 1))
    return thread, found


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_requests_end(which: signal.Signals) -> None:
    server = ServingProcess("--grace", "3600")
    children = psutil.Process(server.process.pid).children(recursive=True)
    thread, found = in_background(server, HEAVY)
    server.process.send_signal(which)
    until_s = time.monotonic() + 10
    while server.get("/ready").status_code == 200 and time.monotonic() < until_s:
        time.sleep(0.01)
    ready = server.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    assert server.get("/health").status_code == 200
    refused = server.post("/v1/completions", LONG)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    thread.join(120)
    code, said = server.ended()
    assert code == 0
    assert events_of(found[0])[-1] == "[DONE]"
    assert "no new requests; 16 answers may end" in said
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert len(gone) == 2


@pytest.mark.parametrize("how", ["second signal", "grace"])
def test_a_second_signal_or_the_end_of_grace_cuts_off_with_an_error_event(how: str) -> None:
    server = ServingProcess(*(("--grace", "0.3") if how == "grace" else ("--grace", "3600")))
    thread, found = in_background(server, HEAVY)
    server.process.send_signal(signal.SIGTERM)
    if how != "grace":
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
    thread.join(60)
    code, said = server.ended()
    assert code == (0 if how == "grace" else 130)
    last = events_of(found[0])[-1]
    assert "shutting down" in last["error"]["message"]
    assert "cut off" in said
    assert "Traceback" not in said


def test_nothing_is_left_behind_after_much_coming_and_going(server: ServingProcess) -> None:
    root = psutil.Process(server.process.pid)

    def held() -> tuple[int, int, int]:
        every = [root, *root.children(recursive=True)]
        return len(every), sum(one.num_threads() for one in every), sum(one.num_fds() for one in every)

    def come_and_go() -> None:
        for number in range(20):
            with httpx.stream("POST", f"{server.url}/completions", json=LONG, timeout=60) as reply:
                if number % 2:
                    next(reply.iter_bytes())
        server.complete(max_tokens=2, regex="[ab]{3}")
        server.chat(max_tokens=2)
        server.post("/v1/completions", {"model": "none"})
        server.wait_for("burnish_admitted_answers", 0)
        server.wait_for("burnish_kv_blocks_used", 0)

    come_and_go()
    before = held()
    come_and_go()
    until_s = time.monotonic() + 15
    while held() != before and time.monotonic() < until_s:
        time.sleep(0.1)  # the server's own connections close when it has noticed
    assert held() == before


def test_the_engines_process_ends_with_a_server_that_is_killed() -> None:
    server = ServingProcess()
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    server.process.kill()
    server.process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
