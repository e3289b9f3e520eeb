"""One prompt to several engines: events, errors that stay in their column, and requests that are let go."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faulty_engines
import pytest
from serving_parts import service_over, until

from burnish.errors import BurnishError, CheckpointError
from burnish.serve.compare_answers import AnswerState, ask
from burnish.serve.compare_group import Engines, ServiceGroup
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_prompt import Asked, asked_of
from burnish.serve.compare_samples import samples
from burnish.serve.compare_sql import SqlRunner

LONG = Asked(question="What are the trails?", max_tokens=800)


@dataclass
class Opened:
    """Models with their engines running, in an event loop of their own."""

    loop: asyncio.AbstractEventLoop
    models: list[ComparedModel]
    group: ServiceGroup
    sql: SqlRunner

    def run(self, what: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(asyncio.wait_for(what, 300))

    def ask(self, asked: Asked, stop: asyncio.Event | None = None) -> AsyncIterator[list[AnswerState]]:
        return ask(self.models, asked, sql=self.sql, stop=stop or asyncio.Event(), pause_s=0)


def opened(*makes: Callable[[], Any]) -> Iterator[Opened]:
    loop = asyncio.new_event_loop()

    async def make() -> Opened:
        models = []
        for place, each in enumerate(makes):
            service = service_over(each)
            of_it: Any = {"model": service.served.models[0], "service": service, "template": "chat"}
            models.append(ComparedModel(name=f"model {place}", digest=f"{place}" * 64, **of_it))
        services = [model.service for model in models]
        return Opened(loop, models, ServiceGroup(services, vital=services), SqlRunner(patience_s=60))

    async def close(opened: Opened) -> None:
        await opened.group.close()
        await opened.sql.close()

    running = loop.run_until_complete(make())
    try:
        running.run(running.group.open())
        running.run(running.group.engine.settled())
        yield running
    finally:
        loop.run_until_complete(close(running))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="module")
def pair(_own_cache: None) -> Iterator[Opened]:
    yield from opened(faulty_engines.slow, faulty_engines.slow)


async def last(answers: AsyncIterator[list[AnswerState]]) -> list[AnswerState]:
    states: list[AnswerState] = []
    async for now in answers:
        states = now
    return states


def test_answers_stream_and_their_sql_is_run(pair: Opened) -> None:
    asked = replace(asked_of(samples()[3]), max_tokens=40)

    async def run() -> None:
        texts: list[str] = []
        states: list[AnswerState] = []
        async for states in pair.ask(asked):
            texts.append(states[0].text)
        assert len(set(texts)) > 3
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
        for state in states:
            assert state.status == "done"
            assert state.error is None
            assert state.text == states[0].text
            assert 0 < state.num_tokens <= 40
            assert state.prompt_tokens > 20
            assert state.ttft_s is not None
            assert state.ttft_s > 0
            assert state.kv_used_bytes == held(pair, state)
            assert state.rows is not None
            assert state.rows.right is False
        assert pair.group.admission.held == 0
        plain = await last(pair.ask(Asked(question="Hello", max_tokens=5)))
        assert [state.rows for state in plain] == [None, None]

    pair.run(run())


def held(pair: Opened, state: AnswerState) -> int:
    """The cache that one answer takes: its tokens but the last one, in whole blocks of 16."""
    stats = pair.models[0].service.engine.stats
    assert stats is not None
    tokens = state.prompt_tokens + state.num_tokens - 1
    return -(-tokens // 16) * (stats.kv_bytes // stats.kv_blocks)


def test_in_turn_one_model_follows_the_other(pair: Opened) -> None:
    async def run() -> None:
        async for first, second in pair.ask(Asked(question="What are the trails?", max_tokens=10, in_turn=True)):
            assert first.status == "done" or second.status == "waiting"
        assert second.status == "done"

    pair.run(run())


@pytest.mark.parametrize("how", ["stop", "close", "cancel"])
def test_what_is_stopped_or_closed_frees_its_request(pair: Opened, how: str) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        answers = pair.ask(LONG, stop)
        states: list[AnswerState] = []

        async def read() -> None:
            nonlocal states
            async for now in answers:
                states = now

        reading = asyncio.create_task(read())
        await until(lambda: len(states) == 2 and all(state.num_tokens > 3 for state in states))
        assert pair.group.admission.held == 2
        if how == "stop":
            stop.set()
            await reading
            assert [state.status for state in states] == ["stopped", "stopped"]
            assert all(state.text for state in states)
        else:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if how == "close":
                await answers.aclose()  # type: ignore[attr-defined]
        assert pair.group.admission.held == 0
        await until(lambda: all(_running(model) == 0 for model in pair.models))

    pair.run(run())


def _running(model: ComparedModel) -> int | None:
    stats = model.service.engine.stats
    return None if stats is None else stats.running


def test_an_engine_that_fails_fails_in_its_column_alone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    dying = functools.partial(faulty_engines.dying_once, str(mark))
    for trio in opened(faulty_engines.missing, dying, faulty_engines.plain):

        async def run(trio: Opened = trio) -> None:
            asked = Asked(question="x", max_tokens=8)
            mark.touch()
            absent, died, well = await last(trio.ask(asked))
            assert (absent.status, absent.error) == ("failed", "there is no such model")
            assert trio.models[0].trouble == "there is no such model"
            assert died.status == "failed"
            assert "restarted" in str(died.error)
            assert "Traceback" not in str(died.error)
            assert well.status == "done"
            assert trio.group.admission.held == 0
            trio.group.admission.draining = True
            *_, refused = await last(trio.ask(asked))
            assert refused.error == "the server is shutting down"

        trio.run(run())


class Lost:
    """An engine that was given up."""

    error = CheckpointError("there is no such model")

    async def settled(self) -> None:
        raise self.error

    async def broken(self) -> BurnishError:
        return self.error


class Well:
    """One that runs."""

    error = None

    async def settled(self) -> None:
        pass


def test_a_group_ends_when_every_vital_engine_is_lost() -> None:
    async def run() -> None:
        lost: Any = Lost()
        well: Any = Well()
        await Engines([lost, well], [lost, well]).settled()
        for vital in ([lost], [lost, lost]):
            with pytest.raises(CheckpointError, match="no such model"):
                await Engines([lost, well], vital).settled()

    asyncio.run(run())


def test_a_group_is_ready_when_no_model_is_still_to_be_loaded() -> None:
    services = [service_over(faulty_engines.plain) for _ in range(2)]
    group = ServiceGroup(services, vital=services)
    seen = []
    for states in (("ready", "starting"), ("ready", "ready"), ("ready", "broken"), ("broken", "broken")):
        for service, state in zip(services, states):
            service.engine.state = state
        seen.append(group.ready)
    assert seen == [False, True, True, False]
