"""`burnish serve` as a process, for tests that need the real thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

BASE = "burnish-sql-base"


class ServingProcess:
    """A server on a free port that takes requests when the constructor returns; `with` ends it."""

    def __init__(self, *options: str, model: str = BASE, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "burnish", "serve", model, "--port", "0", "--json", "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("}"):
                break
        if not lines:
            _, errors = self.process.communicate(timeout=60)
            raise RuntimeError(errors)
        self.record: dict[str, Any] = json.loads("".join(lines))
        self.url: str = self.record["url"]
        self.root = self.url.removesuffix("/v1")
        self.port = urlsplit(self.url).port or 0

    def __enter__(self) -> ServingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> tuple[int, str]:
        """Ask it to end; as `ended`."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Wait for its end; its exit code and what it said."""
        try:
            _, said = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
            raise AssertionError(f"the server did not end: {said}") from None
        return self.process.returncode, said

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.root}{path}", timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.root}{path}", json=body, timeout=120, **options)

    def complete(self, **fields: Any) -> dict[str, Any]:
        """A completion that has to go well."""
        return self._answer("/v1/completions", {"model": BASE, "prompt": "CREATE TABLE", "temperature": 0, **fields})

    def chat(self, **fields: Any) -> dict[str, Any]:
        """A chat completion that has to go well."""
        messages = [{"role": "user", "content": "How many rows are there?"}]
        return self._answer("/v1/chat/completions", {"model": BASE, "messages": messages, "temperature": 0, **fields})

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.post(path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read."""
        found = {}
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def wait_for(self, what: str, value: float, *, seconds: float = 30) -> None:
        """Wait until a metric has this value."""
        until_s = time.monotonic() + seconds
        while (found := self.metrics().get(what)) != value:
            if time.monotonic() > until_s:
                raise AssertionError(f"{what} is {found}, not {value}")
            time.sleep(0.02)


def events_of(text: str) -> list[Any]:
    """The JSON of a stream's events; the last one is the text [DONE] where the stream ended well."""
    pieces = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [piece if piece == "[DONE]" else json.loads(piece) for piece in pieces]
