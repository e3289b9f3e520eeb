"""Many asynchronous callers get what they would get alone; leaving frees blocks; errors and closing reach everybody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from burnish.engine.async_engine import AsyncEngine
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError, WorkerError
from burnish.models.decoder import Decoder

LONG = SamplingParams(max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=240, ignore_eos=True)
MakePrompts = Callable[..., list[list[int]]]


async def no_blocks_left(served: AsyncEngine) -> None:
    for _ in range(50):
        if served.stats().kv_blocks_used == 0 and served.stats().running == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("blocks are still held")


def slow(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    """Steps take long enough that a request which nobody aborts is still there when somebody looks."""
    forward = engine.runner.backend.forward

    def late(step: Any, *, greedy: bool) -> Any:
        time.sleep(0.01)
        return forward(step, greedy=greedy)

    monkeypatch.setattr(engine.runner.backend, "forward", late)
    return engine


def test_concurrent_streams_equal_sequential_answers(
    decoder: Decoder, tokenizer: Any, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(6, seed=1)
    engine = NativeEngine(decoder, tokenizer=tokenizer, max_num_seqs=4, speculation="off")
    expected = list(engine.generate(prompts, LONG))

    async def one(served: AsyncEngine, prompt: list[int]) -> tuple[str, tuple[int, ...], int]:
        events = [event async for event in served.stream(prompt, LONG)]
        assert [event.output is None for event in events] == [True] * (len(events) - 1) + [False]
        return "".join(event.text for event in events), sum((event.token_ids for event in events), ()), len(events)

    async def all_of_them() -> None:
        async with AsyncEngine(engine) as served:
            found = await asyncio.gather(*(one(served, prompt) for prompt in prompts))
            assert [(text, ids) for text, ids, _ in found] == [(one.text, one.token_ids) for one in expected]
            assert all(count == 20 for _, _, count in found)
            await no_blocks_left(served)

    asyncio.run(all_of_them())


def test_generate_gives_all_choices(decoder: Decoder) -> None:
    async def run() -> None:
        async with AsyncEngine(NativeEngine(decoder)) as served:
            params = SamplingParams(max_tokens=12, temperature=1.5, seed=2, n=3, ignore_eos=True)
            output = await served.generate([5, 6, 7], params)
            assert len({choice.token_ids for choice in output.choices}) == 3
            with pytest.raises(RequestError, match="n=3"):
                async for _ in served.stream([5, 6, 7], params):
                    pass

    asyncio.run(run())


def test_leaving_a_stream_frees_its_blocks_and_leaves_others(
    decoder: Decoder, make_prompts: MakePrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(2, seed=3)
    engine = NativeEngine(decoder)
    [expected] = engine.generate(prompts[:1], LONG)
    slow(engine, monkeypatch)

    async def leave(served: AsyncEngine) -> None:
        events = served.stream(prompts[1], ENDLESS)
        async for _ in events:
            break
        await events.aclose()

    async def run() -> None:
        async with AsyncEngine(engine) as served:
            output, _ = await asyncio.gather(served.generate(prompts[0], LONG), leave(served))
            assert output.token_ids == expected.token_ids
            await no_blocks_left(served)

    asyncio.run(run())


def test_cancelling_a_task_aborts_its_request(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slow(NativeEngine(decoder), monkeypatch)

    async def run() -> None:
        async with AsyncEngine(engine) as served:
            task = asyncio.create_task(served.generate([5, 6], ENDLESS))
            while served.stats().running == 0:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await no_blocks_left(served)

    asyncio.run(run())


def test_bad_requests_are_refused_and_others_run(decoder: Decoder) -> None:
    async def run() -> None:
        async with AsyncEngine(NativeEngine(decoder)) as served:
            with pytest.raises(RequestError, match="empty"):
                await served.generate([], LONG)
            assert len((await served.generate([5], LONG)).token_ids) == 20

    asyncio.run(run())


def test_error_of_a_step_reaches_every_caller(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NativeEngine(decoder)
    forward, calls = engine.runner.backend.forward, 0

    def failing(step: Any, *, greedy: bool) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("the card fell off the bus")
        return forward(step, greedy=greedy)

    monkeypatch.setattr(engine.runner.backend, "forward", failing)

    async def run() -> None:
        async with AsyncEngine(engine) as served:
            answers = await asyncio.gather(
                *(served.generate([5, index], ENDLESS) for index in range(3)), return_exceptions=True
            )
            assert ["off the bus" in str(answer) for answer in answers] == [True] * 3
            assert len((await served.generate([5], LONG)).token_ids) == 20
            await no_blocks_left(served)

    asyncio.run(run())


def test_closing_tells_who_waits_and_refuses_who_comes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = slow(NativeEngine(decoder), monkeypatch)

    async def run() -> None:
        served = AsyncEngine(engine)
        task = asyncio.create_task(served.generate([5, 6], ENDLESS))
        while served.stats().running == 0:
            await asyncio.sleep(0)
        await served.close()
        await served.close()
        with pytest.raises(WorkerError, match="closed before"):
            await task
        with pytest.raises(WorkerError, match="is closed"):
            await served.generate([5], LONG)

    asyncio.run(run())
    assert engine.stats().kv_blocks_used == 0
    assert len(next(engine.generate([[5]], LONG)).token_ids) == 20
