"""Any server that speaks OpenAI's HTTP protocol, behind the Engine protocol: each request is one streamed call.

Texts and token ids go to `/completions`, chat messages to `/chat/completions`. What a request asks beyond OpenAI's own
fields is refused, except `ignore_eos`, which common servers take and whose effect is checked. Answers have no token
ids, as the protocol has none; token counts are the server's. The environment's OPENAI_API_KEY is sent where it is set.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from burnish.engine.openai_call import OpenAICall
from burnish.engine.outputs import EngineStats, RequestOutput, StreamEvent
from burnish.engine.prompts import Prompt
from burnish.engine.sampling import SamplingParams
from burnish.engine.supported import require_supported
from burnish.errors import BurnishError, ConfigError, RequestError

SUPPORTED = frozenset(
    (
        "max_tokens",
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "ignore_eos",
    )
)
CONNECT_S = 10.0
SILENCE_S = 600.0
"""Longest wait for the next piece; the first has to wait for its turn in the server's queue."""
UNKNOWN_LENGTH = 1 << 30


class OpenAIEngine:
    """A client of one server and one of its models. Requests run in threads, `max_num_seqs` at once.

    Args:
        url: "http://host:port/v1", with "#name" where the server has several models.
        max_num_seqs: requests on their way at once.
        max_model_len: most tokens of prompt and answer, where it is known; the server has the last word.
        silence_s: longest wait for a byte of an answer.

    Raises:
        ConfigError: the URL is malformed, or the server has no such model.
        BurnishError: the server cannot be reached.
    """

    name = "openai"

    def __init__(
        self,
        url: str,
        *,
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigError("max_num_seqs is out of range", got=max_num_seqs, expected="1 or more")
        address, _, wanted = url.partition("#")
        parts = urlsplit(address)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError("the server's URL is malformed", got=address, expected="http://host:port/v1") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError("the server's URL is malformed", got=address, expected="http://host:port/v1")
        self.url = address.rstrip("/")
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, port
        self._path = parts.path.rstrip("/")
        self._silence_s = silence_s
        started = time.perf_counter()
        served = self._models()
        self._load_s = time.perf_counter() - started
        self.model = _choose(served, wanted, self.url)
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or _length(served.get(self.model)) or UNKNOWN_LENGTH
        self._warmup_s = 0.0
        self._running = self._waiting = 0
        self._lock = threading.Lock()

    def generate(
        self, prompts: SequenceOf[Prompt], params: SamplingParams | SequenceOf[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """See `Engine.generate`. Closing the iterator closes the connections, which ends the requests."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, SequenceOf):
            raise RequestError("prompts must be a list of prompts", got=type(prompts).__name__)
        every = [params or SamplingParams()] * len(prompts) if not isinstance(params, SequenceOf) else list(params)
        if len(every) != len(prompts):
            raise RequestError(
                "prompts and parameters differ in number", got=f"{len(prompts)} prompts, {len(every)} parameters"
            )
        calls = [self._call(prompt, one, index) for index, (prompt, one) in enumerate(zip(prompts, every))]
        return self._run_all(calls)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """See `Engine.stream`."""
        return self._run_streaming(self._call(prompt, params or SamplingParams(), 0))

    def warm_up(self) -> float:
        """Ask for two tokens; returns seconds, also kept for `stats`."""
        started = time.perf_counter()
        for _ in self.generate(["Hello"], SamplingParams(max_tokens=2)):
            pass
        self._warmup_s = time.perf_counter() - started
        return self._warmup_s

    def stats(self) -> EngineStats:
        """What a client can know: no sizes and no threads (0), and no dtype ("")."""
        return EngineStats(
            engine=self.name,
            dtype="",
            device=self.url,
            threads=0,
            weights_bytes=0,
            kv_bytes=0,
            load_s=self._load_s,
            optimise_s=0.0,
            warmup_s=self._warmup_s,
            running=self._running,
            waiting=self._waiting,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
        )

    def _call(self, prompt: Prompt, params: SamplingParams, index: int) -> OpenAICall:
        require_supported(params, SUPPORTED, engine=self.name)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        optional = {
            "top_p": (params.top_p, 1.0),
            "presence_penalty": (params.presence_penalty, 0.0),
            "frequency_penalty": (params.frequency_penalty, 0.0),
            "seed": (params.seed, None),
            "stop": (list(params.stop), []),
            "ignore_eos": (params.ignore_eos, False),
            "logit_bias": ({str(token_id): bias for token_id, bias in params.biases}, {}),
        }
        body |= {key: value for key, (value, default) in optional.items() if value != default}
        is_chat = (
            not isinstance(prompt, str)
            and isinstance(prompt, SequenceOf)
            and len(prompt) > 0
            and all(isinstance(one, Mapping) for one in prompt)
        )
        if is_chat:
            body["messages"] = [dict(message) for message in prompt]  # type: ignore[arg-type]
        elif isinstance(prompt, str):
            body["prompt"] = prompt
        elif isinstance(prompt, SequenceOf) and all(type(token) is int for token in prompt):
            body["prompt"] = list(prompt)
        else:
            raise RequestError("a prompt is of the wrong kind", got=type(prompt).__name__)
        if not prompt:
            raise RequestError("a prompt is empty", expected="at least one token")
        return OpenAICall(
            index=index,
            path="/chat/completions" if is_chat else "/completions",
            body=json.dumps(body).encode(),
            prompt=prompt if isinstance(prompt, str) else None,
            params=params,
        )

    def _run_all(self, calls: list[OpenAICall]) -> Generator[RequestOutput, None, None]:
        for call in calls:
            call.arrival_s = time.perf_counter()
        with self._lock:
            self._waiting += len(calls)
        pool = ThreadPoolExecutor(min(self.max_num_seqs, max(1, len(calls))), thread_name_prefix="openai")
        answers = [pool.submit(self._run, call) for call in calls]
        try:
            for answer in answers:
                yield answer.result()
        finally:
            cancelled = sum(answer.cancel() for answer in answers)
            for call in calls:
                call.close()
            pool.shutdown(wait=True)
            with self._lock:
                self._waiting -= cancelled

    def _run(self, call: OpenAICall) -> RequestOutput:
        with self._lock:
            self._waiting -= 1
        for _ in self._pieces(call):
            pass
        return call.output()

    def _run_streaming(self, call: OpenAICall) -> Generator[StreamEvent, None, None]:
        call.arrival_s = time.perf_counter()
        pieces = self._pieces(call)
        try:
            for piece in pieces:
                yield StreamEvent(text=piece, token_ids=())
            yield StreamEvent(text="", token_ids=(), output=call.output())
        finally:
            call.close()
            pieces.close()

    def _pieces(self, call: OpenAICall) -> Generator[str, None, None]:
        """Send a call and take its answer apart."""
        with self._lock:
            self._running += 1
        try:
            for record in self._events(call):
                usage = record.get("usage")
                if isinstance(usage, dict):
                    call.usage = usage
                for choice in record.get("choices") or ():
                    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    call.finish_reason = choice.get("finish_reason") or call.finish_reason
                    if piece:
                        call.take(piece)
                        yield piece
            call.end_s = time.perf_counter()
            call.check()
        finally:
            with self._lock:
                self._running -= 1

    def _events(self, call: OpenAICall) -> Iterator[dict[str, Any]]:
        """The JSON records of a stream of server-sent events."""
        connection = self._connection()
        response: http.client.HTTPResponse | None = None
        try:
            connection.connect()
            call.hold(connection.sock)
            response = self._send(connection, "POST", call.path, call.body)
            if "text/event-stream" not in (response.getheader("content-type") or ""):
                raise BurnishError(f"{self.url} does not stream its answers", expected="text/event-stream")
            while True:
                line = response.readline()
                if not line:
                    raise BurnishError(f"{self.url} broke off an answer")
                field_name, _, value = line.decode("utf-8", "replace").strip().partition(":")
                value = value.strip()
                if field_name != "data":
                    continue
                if value == "[DONE]":
                    return
                record = json.loads(value)
                if not isinstance(record, dict):
                    raise ValueError(value)
                if record.get("error"):
                    raise BurnishError(f"{self.url} failed: {_message(record)}")
                yield record
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise BurnishError(f"{self.url} sent what is not JSON", got=" ".join(str(error).split())[:120]) from error
        finally:
            if response is not None:
                response.close()
            connection.close()

    def _models(self) -> dict[str, dict[str, Any]]:
        connection = self._connection(timeout_s=CONNECT_S)
        try:
            body = json.loads(self._send(connection, "GET", "/models", None).read())
            return {str(one["id"]): one for one in body["data"]}
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise BurnishError(
                f"{self.url}/models is not a list of models", remedy="Does the URL end in /v1?"
            ) from error
        finally:
            connection.close()

    def _connection(self, *, timeout_s: float | None = None) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=timeout_s or self._silence_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        key = os.environ.get("OPENAI_API_KEY")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection.request(method, self._path + path, body, headers)
        response = connection.getresponse()
        if response.status >= 400:
            text = response.read(4096).decode("utf-8", "replace")
            with suppress(ValueError):
                text = _message(json.loads(text))
            kind = RequestError if response.status < 500 else BurnishError
            raise kind(
                f"{self.url}{path} answered {response.status}: {' '.join(text.split())[:300] or response.reason}"
            )
        return response

    def _unreachable(self, error: Exception) -> BurnishError:
        if isinstance(error, TimeoutError):
            return BurnishError(f"{self.url} did not answer in time", expected=f"a byte every {self._silence_s:g} s")
        return BurnishError(f"{self.url} cannot be reached: {error or type(error).__name__}")


def _choose(served: Mapping[str, Any], wanted: str, url: str) -> str:
    if wanted and wanted not in served:
        raise ConfigError(f"{url} does not serve {wanted}", expected=f"one of {', '.join(served) or 'none'}")
    if not wanted and len(served) != 1:
        raise ConfigError(
            f"{url} serves {len(served)} models",
            got=", ".join(served) or None,
            remedy="Name one after a #, as in openai:http://host/v1#name.",
        )
    return wanted or next(iter(served))


def _length(entry: Mapping[str, Any] | None) -> int | None:
    """Some servers say how long a context may be."""
    length = (entry or {}).get("max_model_len")
    return length if isinstance(length, int) and length > 1 else None


def _message(record: Any) -> str:
    error = record.get("error", record) if isinstance(record, dict) else record
    return str(error.get("message", error) if isinstance(error, dict) else error)
