"""Running an application on a socket, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from burnish.errors import ConfigError, WorkerError
from burnish.serve.admission import answers
from burnish.serve.connections import counting, cut_off
from burnish.serve.running import Running

_SEND_BUFFER_BYTES = 128 << 10
_BACKLOG = 1024
_DESCRIPTORS = 65536
_CHECK_EVERY_S = 0.05
_CLOSE_S = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket's address, taken before anything large is loaded; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ConfigError("the port is out of range", got=port, expected="0..65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"there is no address {host}", got=error.strerror or error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: a reader that stalls is noticed before megabytes wait in the kernel.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        remedy = "Choose another --port, or 0 for a free one."
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}", remedy=remedy) from error
    return listener


def allow_connections() -> None:
    """Let this process hold as many descriptors as it may: each connection is one."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_loopback(host: str) -> bool:
    """Only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def url_of(listener: socket.socket) -> str:
    """The API's address, as clients are given it."""
    return api_url(*listener.getsockname()[:2])


def api_url(host: str, port: int) -> str:
    """As `url_of`, of an address that is listened on; of "every network" it is this machine's own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def run_server(app: ASGIApp, service: Running, listener: socket.socket, *, on_ready: Callable[[], None]) -> int:
    """Serve until a signal ends it; returns the exit code: 0, or 130 where a second signal cut requests off.

    The first SIGTERM or SIGINT drains: /ready fails, nobody new is let in, and what runs may end within the grace time.

    Args:
        on_ready: called once, when requests are taken; never where a signal came before.

    Raises:
        BurnishError: the engine could not be made, or had to be given up; the application did not start.
    """
    fast_http, fast_loop = (importlib.util.find_spec(name) is not None for name in ("httptools", "uvloop"))
    config = uvicorn.Config(
        app,
        http="httptools" if fast_http else "h11",
        loop="uvloop" if fast_loop else "asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(service.settings.idle_timeout_s) or 1,
        timeout_graceful_shutdown=max(1, int(_CLOSE_S)),
        lifespan="on",
        ws="none",
        backlog=_BACKLOG,
    )
    config.load()
    config.http_protocol_class = counting(config.http_protocol_class)
    allow_connections()
    runner = _Runner(uvicorn.Server(config), service, on_ready)
    factory = config.get_loop_factory()
    loop = factory() if factory is not None else asyncio.new_event_loop()
    try:
        return loop.run_until_complete(runner.run(listener))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        listener.close()


class _Runner:
    def __init__(self, server: uvicorn.Server, service: Running, on_ready: Callable[[], None]) -> None:
        self._server = server
        self._service = service
        self._on_ready = on_ready
        self._signals = 0
        self._drain = asyncio.Event()
        self._now = asyncio.Event()

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        # uvicorn's own handling ends at once and knows nothing of what runs.
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._on_signal, each)
        serving = asyncio.create_task(self._serve(listener))
        announcing = asyncio.create_task(self._announce())
        open_now, settings = self._server.server_state.connections, self._service.settings
        cutting = cut_off(open_now, settings, self._service.metrics.cut_readers)
        helpers = [announcing, asyncio.create_task(cutting), asyncio.create_task(self._end_in_order())]
        try:
            await asyncio.wait([serving, announcing], return_when=asyncio.FIRST_COMPLETED)
            self._server.should_exit = True
            await serving
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        if not announcing.cancelled():
            announcing.result()
        return 130 if self._signals > 1 else 0

    def _on_signal(self, which: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            self._service.admission.draining = True
            self._service.say(
                f"{which.name}: no new requests; {answers(self._service.admission.held)} may end within "
                f"{self._service.settings.grace_s:g} s. A second signal ends at once."
            )
            self._drain.set()
        else:
            self._now.set()

    async def _serve(self, listener: socket.socket) -> None:
        try:
            await self._server.serve(sockets=[listener])
        except SystemExit as error:  # so newer versions of uvicorn say that the application did not start
            raise WorkerError("the server could not be started") from error
        if not self._server.started:
            raise WorkerError("the server could not be started")

    async def _announce(self) -> None:
        await self._service.engine.settled()
        if not self._signals:
            self._on_ready()
        raise await self._service.engine.broken()

    async def _end_in_order(self) -> None:
        """Wait for a signal, then for what runs, then let go."""
        await self._drain.wait()
        until_s = time.monotonic() + self._service.settings.grace_s
        while self._service.admission.held and time.monotonic() < until_s and not self._now.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._now.wait(), _CHECK_EVERY_S)
        if self._service.admission.held:
            self._service.say(f"{answers(self._service.admission.held)} cut off")
            self._service.engine.fail_all(WorkerError("the server is shutting down"))
            await asyncio.sleep(_CHECK_EVERY_S)
        self._server.should_exit = True
