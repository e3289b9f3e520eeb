"""`burnish compare` and `serve --ui`: what they refuse, and that the page stands beside the API."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from burnish.cli.main import run

BASE = "burnish-sql-base"
_NEEDED = ("gradio", "fastapi", "uvicorn", "prometheus_client", "httpx")
needs_page = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _NEEDED), reason="the extras serve and ui bring them"
)


@pytest.mark.parametrize("words", [["compare", BASE, BASE], ["serve", BASE, "--ui"]], ids=["compare", "serve"])
@needs_page
def test_a_missing_gradio_names_its_extra(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(words) == 6
    assert capsys.readouterr().err == "error: gradio is not installed. Install it with: pip install 'burnish[ui]'\n"


@needs_page
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", BASE], "Missing argument"),
        (["compare", BASE, "/nowhere/at/all", "--port", "0"], "is no model"),
        (["compare", BASE, BASE, "--port", "70000"], "port is out of range"),
        (["compare", BASE, BASE, "--concurrency", "0"], "--concurrency is out of range"),
        (["compare", BASE, BASE, "--api-keys", "/nowhere/keys"], "cannot be read as API keys"),
        (["serve", BASE, "--compare", BASE], "--compare is for the page. Add --ui."),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@needs_page
def test_a_taken_port_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(["compare", BASE, BASE, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


@needs_page
@pytest.mark.slow
def test_the_page_stands_beside_the_api_and_asks_for_its_keys(tmp_path: Path) -> None:
    import httpx

    keys = tmp_path / "keys"
    keys.write_text("a-good-long-key\n", encoding="utf-8")
    command = [sys.executable, "-m", "burnish", "serve", BASE, "--ui", "--port", "0", "--json", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--api-keys", str(keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("}"):
                    break
            root = json.loads("".join(lines))["url"].removesuffix("/v1")
            with httpx.Client(base_url=root, timeout=120) as client:
                assert client.get("/health").status_code == 200
                assert client.get("/v1/models").status_code == 401
                moved = client.get("/", params={"q": "a b"})
                assert (moved.status_code, moved.headers["location"]) == (307, "/ui/?q=a+b")
                assert client.get("/ui/").status_code == 401
                assert client.get("/ui/config").status_code == 401
                # The guard is before the form for the key, too: a body that is too large is refused before it is sent.
                plain = http.client.HTTPConnection(urlsplit(root).netloc, timeout=120)
                plain.putrequest("POST", "/ui/login")
                plain.putheader("Content-Length", str(1 << 30))
                plain.endheaders()
                assert plain.getresponse().status == 413
                plain.close()
                assert client.post("/ui/login", data={"key": "a-good-long-key"}).status_code == 303
                page = client.get("/ui/")
                assert page.status_code == 200
                assert "gradio.app" not in page.text
                assert "googleapis" not in page.text
                assert client.get("/v1/models").status_code == 401, "the page's cookie is no key of the API"
                headers = {"authorization": "Bearer a-good-long-key"}
                [card] = client.get("/v1/models", headers=headers).json()["data"]
                assert card["id"] == BASE
                asked = {"model": BASE, "prompt": "CREATE TABLE", "max_tokens": 4}
                assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200
                assert client.post("/ui/gradio_api/upload", content=b"x").status_code == 404
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "pending" not in said
