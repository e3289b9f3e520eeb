"""A service without a network: its application called as an ASGI server would call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from faulty_engines import BASE

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.serve.app import make_app
from burnish.serve.service import Served, ServedModel, Service
from burnish.serve.settings import ServeSettings

BODY = {"model": BASE, "prompt": "CREATE TABLE", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def service_over(make: Callable[[], Any], said: list[str] | None = None, **settings: Any) -> Service:
    """A service that is not open yet."""
    tokenizer = Tokenizer.load(bundled_path(BASE))
    served = Served(
        models=(ServedModel(name=BASE, root=BASE, fingerprint="0" * 64),),
        make_engine=make,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
    )
    lines = [] if said is None else said
    return Service(served, ServeSettings(**settings), keys=None, say=lines.append)


@asynccontextmanager
async def opened(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the open service; the engine takes requests."""
    await service.open()
    try:
        await asyncio.wait_for(service.engine.settled(), 120)
        transport = httpx.ASGITransport(app=make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as client:
            yield client
    finally:
        await service.close()


async def until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait for something that has to happen."""

    async def poll() -> None:
        while not true():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), seconds)
