"""An engine that answers with the prompt turned round, and short ways to make jobs."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from burnish.engine.outputs import RequestMetrics, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError
from burnish.scale.leases import NoPublisher
from burnish.scale.opening import QueueAddress, open_worker
from burnish.scale.store import JobStore
from burnish.scale.submit import submit_file
from burnish.scale.worker import Worker
from burnish.scale.worker_settings import WorkerReport


class TurningEngine:
    """Takes `max_tokens` steps for each answer, `slots` at once; "bad" prompts are refused, "broken" ones raise later.

    Attributes:
        most: most requests that were inside together.
        together: the prompts of each step that raised.
    """

    def __init__(self, slots: int = 4, on_step: Callable[[], None] = lambda: None) -> None:
        self.tokenizer = object()
        self.slots = slots
        self.on_step = on_step
        self.running: dict[int, list[Any]] = {}
        self.most = 0
        self.order: list[Any] = []
        self.together: list[list[Any]] = []
        self._ids = itertools.count()

    def submit(self, prompt: Any, params: SamplingParams | None = None) -> int:
        if prompt == "bad":
            raise RequestError("a prompt is empty")
        number = next(self._ids)
        self.running[number] = [prompt, (params or SamplingParams()).max_tokens]
        self.most = max(self.most, len(self.running))
        self.order.append(prompt)
        return number

    def abort(self, request_id: int) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[RequestOutput]:
        self.on_step()
        active = list(self.running)[: self.slots]
        if any(self.running[number][0] == "broken" for number in active):
            self.together.append([self.running[number][0] for number in active])
            raise RuntimeError("a step failed")
        finished = []
        for number in active:
            self.running[number][1] -= 1
            if self.running[number][1] <= 0:
                prompt = self.running.pop(number)[0]
                finished.append(_output(number, prompt[::-1]))
        return finished


def _output(number: int, text: str) -> RequestOutput:
    metrics = RequestMetrics(prompt_tokens=3, output_tokens=len(text), ttft_ms=1.0, tpot_ms=1.0, e2e_ms=2.0)
    return RequestOutput(index=number, prompt=None, text=text, token_ids=(1,), finish_reason="stop", metrics=metrics)


def write_prompts(path: Path, rows: Sequence[Any]) -> Path:
    """A JSONL file; texts become prompts."""
    rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def submit(store: JobStore, folder: Path, rows: Sequence[Any], *, publisher: Any = None, **options: Any) -> str:
    """Submit rows as a job; returns its name."""
    file = write_prompts(folder / "prompts.jsonl", rows)
    settings: dict[str, Any] = {"queue": "default", "params": {"max_tokens": 3}, **options}
    return submit_file(store, publisher or NoPublisher(), file, source=file.name, **settings).job_id


def work(
    address: QueueAddress, engine: Any, *, slots: int = 4, make: type[Worker] = Worker, **options: Any
) -> WorkerReport:
    """Work until the queue is empty."""
    with open_worker(
        address, lambda: engine, model="turning", slots=slots, make=make, **{"until_empty": True, **options}
    ) as worker:
        return worker.run()


class Background:
    """A worker in a thread of its own, as `with Background(...)`; drained at the end."""

    def __init__(self, address: QueueAddress, engine: Any, **options: Any) -> None:
        self._opened = open_worker(address, lambda: engine, model="turning", **{"slots": 4, **options})
        self.report: WorkerReport | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Background:
        self.worker = self._opened.__enter__()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        try:
            self.report = self.worker.run()
        except BaseException as error:
            self.error = error

    def __exit__(self, *exception: object) -> None:
        self.worker.drain()
        self.thread.join(300)
        self._opened.__exit__(None, None, None)
        assert not self.thread.is_alive()
