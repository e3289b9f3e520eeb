"""Whatever happens to the engine: every stream is told, and the next requests are answered by a new one."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from pathlib import Path
from typing import Any

import faulty_engines
import httpx
import pytest
from serving_parts import BODY, opened, service_over, until
from serving_process import events_of

from burnish.errors import CheckpointError, WorkerError

LONG = {**BODY, "max_tokens": 900}  # still there when the last one arrives, also on a busy machine
STREAM = {**LONG, "stream": True}


async def answers(client: httpx.AsyncClient) -> str:
    reply = await client.post("/v1/completions", json={**BODY, "max_tokens": 5})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


@pytest.mark.parametrize("make", [faulty_engines.failing_once, faulty_engines.dying_once, faulty_engines.hanging_once])
def test_streams_get_an_error_event_and_later_requests_their_answers(make: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    said: list[str] = []
    service = service_over(functools.partial(make, str(mark)), said, engine_timeout_s=2)

    async def run() -> None:
        async with opened(service) as client:
            expected = await answers(client)
            streams = [asyncio.create_task(client.post("/v1/completions", json=STREAM)) for _ in range(3)]
            await until(lambda: service.engine.stats is not None and service.engine.stats.running == 3)
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            await until(lambda: service.engine.stats is not None and service.engine.stats.running == 4)
            mark.touch()
            for stream in streams:
                events = events_of((await stream).text)
                assert events[-1] != "[DONE]"
                assert events[-1]["error"]["type"] == "server_error"
                assert "fail" in events[-1]["error"]["message"]
            reply = await whole
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert service.admission.held == 0
            await asyncio.wait_for(service.engine.settled(), 120)
            assert await answers(client) == expected

    asyncio.run(run())
    restarted = make is not faulty_engines.failing_once
    assert service.engine.restarts == restarted
    assert any("started anew" in line for line in said) == restarted


def test_requests_during_a_restart_are_told_when_to_come_back() -> None:
    service = service_over(faulty_engines.plain)

    async def run() -> None:
        async with opened(service) as client:
            assert service.engine.pid is not None
            os.kill(service.engine.pid, signal.SIGKILL)
            await until(lambda: service.engine.state == "restarting")
            reply = await client.post("/v1/completions", json=BODY)
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            before = service.engine.counted("output_tokens")
            await asyncio.wait_for(service.engine.settled(), 120)
            await answers(client)
            await until(lambda: service.engine.counted("output_tokens") > before)
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(run())


def test_an_engine_that_keeps_dying_is_given_up() -> None:
    service = service_over(faulty_engines.always_dying, max_restarts=1)

    async def run() -> None:
        async with opened(service) as client:
            for _ in range(2):
                assert (await client.post("/v1/completions", json=BODY)).status_code == 503
                await until(lambda: service.engine.state in ("ready", "broken"), seconds=120)
            error = await asyncio.wait_for(service.engine.broken(), 60)
            assert isinstance(error, WorkerError)
            assert "2 times" in error.message
            assert (await client.get("/health")).status_code == 503

    asyncio.run(run())


def test_an_engine_that_cannot_be_made_says_why() -> None:
    service = service_over(faulty_engines.missing)

    async def run() -> None:
        with pytest.raises(CheckpointError, match="no such model"):
            async with opened(service):
                pass

    asyncio.run(run())
    assert service.engine.restarts == 0


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_engine_that_was_there_is_tried_again_where_it_cannot_be_made(comes_back: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    said: list[str] = []
    make = functools.partial(faulty_engines.refused_while, str(mark))
    service = service_over(make, said, max_restarts=5 if comes_back else 1)

    async def run() -> None:
        async with opened(service) as client:
            expected = await answers(client)
            mark.touch()
            assert service.engine.pid is not None
            os.kill(service.engine.pid, signal.SIGKILL)
            if not comes_back:
                error = await asyncio.wait_for(service.engine.broken(), 120)
                assert isinstance(error, WorkerError)
                assert "could not be made again (it does not fit now) 2 times" in error.message
                return
            await until(lambda: any("made again" in line for line in said), seconds=120)
            assert (await client.get("/health")).status_code == 200
            mark.unlink()
            await asyncio.wait_for(service.engine.settled(), 120)
            assert await answers(client) == expected

    asyncio.run(run())
