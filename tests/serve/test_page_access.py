"""Who reaches the page, and what of it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from burnish.serve.keys import KeyRing
from burnish.serve.page_access import COOKIE, PageAccess

KEY = "a-good-long-key"


async def whatever(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"the page"})


def ask(method: str, path: str, *, keys: KeyRing | None = None, access: PageAccess | None = None, **more: Any) -> Any:
    refused: list[str] = []
    app = access or PageAccess(whatever, prefix="/ui", keys=keys, on_refused=refused.append)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/ui/"),
        ("GET", "/ui/config"),
        ("GET", "/ui/assets/index-1.js"),
        ("GET", "/ui/gradio_api/queue/data"),
        ("GET", "/ui/gradio_api/heartbeat/abc123"),
        ("POST", "/ui/gradio_api/queue/join"),
        ("POST", "/ui/gradio_api/cancel"),
    ],
)
def test_what_the_page_needs_is_there(method: str, path: str) -> None:
    reply = ask(method, path)
    assert reply.text == "the page"
    assert "default-src 'self'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/ui/gradio_api/upload"),
        ("GET", "/ui/gradio_api/file=/etc/passwd"),
        ("GET", "/ui/gradio_api/proxy=https://example.org"),
        ("GET", "/ui/monitoring"),
        ("POST", "/ui/gradio_api/run/predict"),
        ("POST", "/ui/gradio_api/component_server"),
        ("POST", "/ui/login"),
        ("DELETE", "/ui/"),
        ("GET", "/ui/gradio_api/vibe-code/"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(method: str, path: str) -> None:
    assert ask(method, path).status_code == 404


def test_another_sites_page_is_turned_away() -> None:
    path = "/ui/gradio_api/queue/join"
    assert ask("POST", path, headers={"origin": "https://evil.example"}).status_code == 403
    assert ask("POST", path, headers={"origin": "null"}).status_code == 403
    assert ask("POST", path, headers={"origin": "http://here"}).status_code == 200


def test_a_key_opens_the_page_and_nothing_else_does() -> None:
    refused: list[str] = []
    access = PageAccess(whatever, prefix="/ui", keys=KeyRing([KEY]), on_refused=refused.append)
    shown = ask("GET", "/ui/", access=access)
    assert shown.status_code == 401
    assert "<form" in shown.text
    assert shown.text != "the page"
    assert ask("GET", "/ui/config", access=access).status_code == 401
    assert ask("POST", "/ui/login", access=access, data={"key": "another-long-key"}).status_code == 401
    assert refused == ["unauthorized"]
    entered = ask("POST", "/ui/login", access=access, data={"key": KEY})
    assert (entered.status_code, entered.headers["location"]) == (303, "/ui/")
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert KEY not in cookie
    token = cookie.partition(";")[0].partition("=")[2]
    assert ask("GET", "/ui/config", access=access, headers={"cookie": f"{COOKIE}={token}"}).text == "the page"
    assert ask("GET", "/ui/config", access=access, headers={"cookie": f"{COOKIE}={token}x"}).status_code == 401
    assert ask("GET", "/ui/config", access=access, headers={"authorization": f"Bearer {KEY}"}).status_code == 401


@pytest.mark.parametrize("body", [b"key=" + b"x" * 10_000, b"\xff\xfe", b"", b"key=%ff"])
def test_a_login_that_is_none_is_refused(body: bytes) -> None:
    assert ask("POST", "/ui/login", keys=KeyRing([KEY]), content=body).status_code == 401
