"""The page as an application: Gradio behind its guards, the API beside it where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from burnish.serve.compare_group import ServiceGroup
from burnish.serve.compare_models import ComparedModel
from burnish.serve.compare_sql import SqlRunner
from burnish.serve.guard import Guard
from burnish.serve.keys import KeyRing
from burnish.serve.page_access import PageAccess
from burnish.serve.page_head import ICON, OwnHead

PREFIX = "/ui"
_MAX_BODY_BYTES = 1 << 20
_CHECK_EVERY_S = 0.05


class PageApp:
    """ASGI application: the page below /ui, everything else from the API, and / leads to the page.

    Args:
        models: the page's columns.
        group: their services; the API opens and closes the first of them itself.
        keys: open the page as well; None lets everybody in.
        api: None where there is only the page.
    """

    def __init__(
        self, models: Sequence[ComparedModel], group: ServiceGroup, *, keys: KeyRing | None, api: FastAPI | None = None
    ) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio

        from burnish.serve.page import SCRIPT, STYLE, Page, theme

        self._api = api
        self._group = group
        self._sql = SqlRunner()
        self._app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        script, style = (file.read_text(encoding="utf-8") for file in (SCRIPT, STYLE))
        self._folder = os.path.dirname(gradio.__file__)
        self._blocks = Page(models, self._sql).build()
        gradio.mount_gradio_app(
            self._app,
            self._blocks,
            PREFIX,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=1,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
        )
        self._gradio: Any = next(each for each in self._app.routes if isinstance(each, Mount)).app
        group.admission.on_drain.append(self._on_drain)
        headed = OwnHead(self._app, path=f"{PREFIX}/", style=style, script=script)
        # The guard is outside: what is typed into the form for the key has its bounds and its time as well.
        self._page = Guard(
            PageAccess(headed, prefix=PREFIX, keys=keys, on_refused=self._count_refused),
            keys=None,
            max_body_bytes=_MAX_BODY_BYTES,
            upload_timeout_s=group.settings.upload_timeout_s,
            on_refused=self._count_refused,
            check_room=_nothing,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and path.startswith(f"{PREFIX}/"):
            await self._page(scope, receive, send)
        elif scope["type"] == "http" and path in ("/", PREFIX):
            query = scope.get("query_string", b"")
            target = f"{PREFIX}/".encode() + (b"?" + query if query else b"")
            await _answer(send, 307, b"", (b"location", target))
        elif scope["type"] == "http" and path == "/favicon.ico":
            await _answer(send, 200, ICON.encode(), (b"content-type", b"image/svg+xml"))
        elif scope["type"] == "http" and self._api is None:
            await self._tell(path, send)
        elif self._api is not None:
            await self._api(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _tell(self, path: str, send: Send) -> None:
        """/health and /ready, as the API's; nothing else is here."""
        engines = {service.served.models[0].name: service.engine.state for service in self._group.services}
        states = set(engines.values())
        good = {"/health": states != {"broken"}, "/ready": self._group.ready}
        record = {
            "status": "ok" if good.get(path) else "not ok",
            "engines": engines,
            "held": self._group.admission.held,
        }
        status = 404 if path not in good else 200 if good[path] else 503
        body = json.dumps(record).encode() if path in good else b""
        await _answer(send, status, body, (b"content-type", b"application/json"))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if self._api is not None:
                await stack.enter_async_context(self._api.router.lifespan_context(self._api))
            stack.push_async_callback(self._group.close)
            await self._group.open()
            stack.push_async_callback(self._sql.close)
            await self._sql.open()
            stack.push_async_callback(self._end_gradio)
            yield

    def _on_drain(self) -> None:
        self._ending = asyncio.ensure_future(self._let_go())

    async def _let_go(self) -> None:
        """Every open page holds a connection that would keep the server; it may go once no answer runs."""
        while self._group.admission.held:
            await asyncio.sleep(_CHECK_EVERY_S)
        self._gradio.stop_event.set()

    async def _end_gradio(self) -> None:
        """What closing Gradio's own server would do, and the end of its background tasks, which know none."""
        self._gradio.stop_event.set()
        self._blocks.is_running = False
        self._blocks._queue.close()
        tasks = [task for task in asyncio.all_tasks() if self._is_gradios(task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_gradios(self, task: asyncio.Task[Any]) -> bool:
        code = getattr(task.get_coro(), "cr_code", None)
        # It also makes tasks that do nothing but sleep; nobody else here does.
        return code is not None and (code.co_filename.startswith(self._folder) or code is asyncio.sleep.__code__)

    def _count_refused(self, reason: str) -> None:
        self._group.metrics.rejections.labels(reason).inc()


def _nothing() -> None:
    pass


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})
