"""A small HTTP server that speaks OpenAI's protocol: one model, made-up answers, every way to fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """How the server answers, and what it was asked."""

    models: tuple[str, ...] = ("tiny",)
    failure: str | None = None
    usage: bool = True
    pause_s: float = 0.0
    honours_ignore_eos: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    broken_pipes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._json(404, {"error": {"message": f"no {self.path}"}})
        elif self.behaviour.failure == "models":
            self._json(200, {"nothing": []})
        else:
            self._json(200, {"data": [{"id": name, "max_model_len": 64} for name in self.behaviour.models]})

    def do_POST(self) -> None:
        how = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with how.lock:
            how.requests.append({"path": self.path, **body})
            how.headers.append({name.lower(): value for name, value in self.headers.items()})
            how.at_once += 1
            self._inside = True
            how.most_at_once = max(how.most_at_once, how.at_once)
        try:
            self._answer(how, body)
        except (BrokenPipeError, ConnectionResetError):
            how.broken_pipes += 1
        finally:
            self._leave(how)

    def _leave(self, how: Behaviour) -> None:
        """Count the request as over; before its last line is sent, as the client may send its next one right then."""
        with how.lock:
            how.at_once -= self._inside
            self._inside = False

    def _answer(self, how: Behaviour, body: dict[str, Any]) -> None:
        if how.failure == "status":
            return self._json(400, {"error": {"message": "prompt is\ntoo long"}})
        if how.failure == "server":
            return self._json(503, {"detail": "busy"})
        if how.failure == "plain":
            return self._json(200, {"choices": [{"text": "all at once"}]})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.end_headers()
        chat = "messages" in body
        count = body["max_tokens"] if how.honours_ignore_eos or not body.get("ignore_eos") else 1
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        for number in range(count):
            if how.failure == "error" and number == 1:
                self._event({"error": {"message": "out of memory"}})
                return None
            if how.failure == "cut" and number == 1:
                return None
            if how.failure == "junk" and number == 1:
                self.wfile.write(b"data: {not json\n\n")
                return None
            piece = f"{asked if isinstance(asked, str) else len(asked)}é{number} "
            choice = {"index": 0, "finish_reason": None}
            self._event({"choices": [choice | ({"delta": {"content": piece}} if chat else {"text": piece})]})
            time.sleep(how.pause_s)
        self._event({"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]})
        if how.usage:
            self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
        self._leave(how)
        self.wfile.write(b": a comment\n\ndata: [DONE]\n\n")
        return None

    def _event(self, record: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(record, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, record: dict[str, Any]) -> None:
        content = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """Run the server in threads; gives its URL."""
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
