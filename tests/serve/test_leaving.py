"""Clients that go away free what they held; those that do not read are cut off; too many are turned away."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import time
from typing import Any

import faulty_engines
import httpx
from serving_parts import BODY, opened, service_over, until
from serving_process import BASE, ServingProcess

LONG = {"model": BASE, "prompt": "CREATE TABLE", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def ask(port: int, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing is read."""
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    connection.sendall(head.encode() + b"\r\n\r\n" + payload)
    return connection


def test_leaving_in_the_middle_frees_blocks_and_counts_as_gone(server: ServingProcess) -> None:
    name = f'burnish_requests_total{{kind="completion",model="{BASE}",outcome="gone"}}'
    before = server.metrics().get(name, 0)
    for stream in (True, False):
        connections = [ask(server.port, {**LONG, "stream": stream, "n": 2, "seed": seed}) for seed in range(3)]
        server.wait_for("burnish_admitted_answers", 6)
        for connection in connections:
            connection.close()
        server.wait_for("burnish_admitted_answers", 0)
        server.wait_for("burnish_kv_blocks_used", 0)
    assert server.metrics()[name] == before + 6
    assert server.complete(max_tokens=3)["usage"]["completion_tokens"] == 3


def test_leaving_while_waiting_gives_the_place_to_others() -> None:
    service = service_over(functools.partial(faulty_engines.slow, 0.005), max_running=32, max_queue=0)

    async def run() -> None:
        async with opened(service) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(32)]
            await until(lambda: service.admission.held == 32)
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            for task in tasks[4:]:
                task.cancel()
            await until(lambda: service.admission.held == 4)
            again = await client.post("/v1/completions", json={**BODY, "max_tokens": 3})
            assert again.status_code == 200
            assert [reply.status_code for reply in await asyncio.gather(*tasks[:4])] == [200] * 4

    asyncio.run(run())


def test_a_flood_gets_answers_or_429_and_room_is_never_exceeded() -> None:
    service = service_over(faulty_engines.plain, max_running=4, max_queue=4)
    most = 0
    enter = service.admission.enter

    def counted(count: int, *, ready: bool) -> None:
        nonlocal most
        enter(count, ready=ready)
        most = max(most, service.admission.held)

    service.admission.enter = counted  # type: ignore[method-assign]

    async def run() -> list[int]:
        async with opened(service) as client:
            body = {**BODY, "max_tokens": 10}
            replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(60)))
            assert service.admission.held == 0
            return [reply.status_code for reply in replies]

    statuses = asyncio.run(run())
    assert set(statuses) == {200, 429}
    assert most == 8


def test_readers_that_stall_and_callers_that_never_ask_are_cut_off() -> None:
    with ServingProcess("--slow-reader", "0.5", "--stream-interval", "0") as server:
        # More than the buffers on the way hold, so that the server has to wait for its reader.
        large = {**LONG, "n": 16, "logprobs": 20, "max_tokens": 300}
        connection = ask(server.port, large, receive_buffer=4096)
        server.wait_for('burnish_cut_connections_total{reason="slow_reader"}', 1, seconds=90)
        server.wait_for("burnish_admitted_answers", 0)
        server.wait_for("burnish_kv_blocks_used", 0)
        connection.settimeout(30)
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
        connection.close()
        assert httpx.get(f"{server.root}/ready", timeout=30).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    service = service_over(faulty_engines.plain, upload_timeout_s=0.2)

    async def run() -> int:
        async with opened(service) as client:

            async def dripping() -> Any:
                yield b"{"
                await asyncio.sleep(30)

            started_s = time.monotonic()
            reply = await client.post("/v1/completions", content=dripping())
            assert time.monotonic() - started_s < 25
            return reply.status_code

    assert asyncio.run(run()) == 408
