"""A server that ends before it began, or cannot begin, says so and nothing else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from burnish.errors import WorkerError
from burnish.serve.server import api_url, bind, is_loopback, run_server, url_of
from burnish.serve.settings import ServeSettings


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


class Loading:
    """An engine that is loaded when the server has ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def settled(self) -> None:
        await self.ended.wait()

    async def broken(self) -> Any:
        await asyncio.Event().wait()

    def fail_all(self, error: WorkerError) -> None:
        pass


class App:
    """An application whose start is what a test makes of it."""

    def __init__(self, engine: Loading, *, signalled: bool) -> None:
        self._engine = engine
        self._signalled = signalled

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        if not self._signalled:
            await send({"type": "lifespan.startup.failed", "message": ""})
            return
        signal.raise_signal(signal.SIGTERM)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._engine.ended.set()
        await asyncio.sleep(0)  # as long as an engine's end takes at least
        await send({"type": "lifespan.shutdown.complete"})


def run(*, signalled: bool) -> tuple[int, list[str]]:
    engine, said = Loading(), []
    running: Any = SimpleNamespace(
        settings=ServeSettings(),
        engine=engine,
        admission=SimpleNamespace(draining=False, held=0),
        metrics=SimpleNamespace(cut_readers=None),
        say=said.append,
    )
    code = run_server(
        App(engine, signalled=signalled), running, bind("127.0.0.1", 0), on_ready=lambda: said.append("ready")
    )
    return code, said


def test_a_signal_while_the_engine_loads_ends_it_and_nothing_is_announced() -> None:
    code, [line] = run(signalled=True)
    assert code == 0
    assert line.startswith("SIGTERM: no new requests; 0 answers")


def test_an_application_that_does_not_start_is_an_error() -> None:
    with pytest.raises(WorkerError, match="could not be started"):
        run(signalled=False)


def test_addresses_are_given_as_clients_use_them() -> None:
    assert api_url("0.0.0.0", 80) == api_url("127.0.0.1", 80) == "http://127.0.0.1:80/v1"
    assert api_url("::", 80) == "http://[::1]:80/v1"
    listener = bind("127.0.0.1", 0)
    assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()
    assert [host for host in ("localhost", "127.1.2.3", "::1", "::12", "0.0.0.0", "10.0.0.1") if is_loopback(host)] == [
        "localhost",
        "127.1.2.3",
        "::1",
    ]
