"""What a server serves: its models, its engine, and what stands between a request and them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.errors import ConfigError, WorkerError
from burnish.serve.admission import Admission, Busy
from burnish.serve.answering import AnswerResponse
from burnish.serve.engine_client import EngineClient
from burnish.serve.faults import Fault
from burnish.serve.forms import ChatForm, CompletionForm
from burnish.serve.jobs import Job
from burnish.serve.keys import KeyRing
from burnish.serve.limits import MAX_SEQUENCES
from burnish.serve.metrics import Metrics
from burnish.serve.prompting import Prompting
from burnish.serve.settings import ServeSettings
from burnish.serve.templates import TemplateRenderer
from burnish.serve.token_texts import TokenTexts


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name that clients may ask for.

    Attributes:
        root: what was loaded under it, as the user named it.
        fingerprint: of its weight files, hexadecimal.
        adapter: the engine's name for it; None for the base.
        parent: the base's name, for an adapter.
    """

    name: str
    root: str
    fingerprint: str
    adapter: str | None = None
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """Everything about the models that the server itself has to know; the weights are the engine's.

    Attributes:
        models: the base first.
        make_engine: see `messages.Start`.
        tokenizer: None where the model has none.
        vocab_size: of the model's output.
    """

    models: tuple[ServedModel, ...]
    make_engine: Callable[[], Any]
    tokenizer: Tokenizer | None
    vocab_size: int
    _by_name: dict[str, ServedModel] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for model in self.models:
            if model.name in self._by_name:
                raise ConfigError(f"two models are called {model.name}", remedy="Give them different names.")
            self._by_name[model.name] = model

    def find(self, name: str) -> ServedModel:
        """The model of this name.

        Raises:
            Fault: there is none (404).
        """
        model = self._by_name.get(name)
        if model is None:
            known = ", ".join(self._by_name)
            raise Fault(
                404,
                f"there is no model {json.dumps(name[:100])}; expected one of {known}",
                param="model",
                code="model_not_found",
            )
        return model


class Service:
    """One server's parts, and the way of a job through them.

    Args:
        keys: None lets everybody in.
        say: told in one line what people should know.
    """

    def __init__(
        self, served: Served, settings: ServeSettings, *, keys: KeyRing | None, say: Callable[[str], None]
    ) -> None:
        self.served = served
        self.settings = settings
        self.keys = keys
        self.say = say
        self.started_s = int(time.time())
        self.engine = EngineClient(
            served.make_engine,
            interval_s=settings.stream_interval_s,
            engine_timeout_s=settings.engine_timeout_s,
            max_restarts=settings.max_restarts,
            say=say,
        )
        self.admission = Admission(max_running=settings.max_running, max_queue=settings.max_queue)
        self.metrics = Metrics(self.engine, self.admission)
        self.texts = TokenTexts(served.tokenizer)
        self.renderer = _renderer(served.tokenizer, settings)
        self.prompting = Prompting(served.tokenizer, self.renderer)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer; 0 until the engine was ready once."""
        if self.engine.stats is not None:
            self._max_model_len = self.engine.stats.max_model_len
        return self._max_model_len

    _max_model_len = 0

    async def open(self) -> None:
        """Start the engine in the background, and the template's process."""
        self.engine.open()
        if self.renderer is not None:
            try:
                await self.renderer.open()
            except WorkerError as error:
                self.say(error.message)  # each conversation tries again

    async def close(self) -> None:
        """End both processes."""
        await self.engine.close()
        if self.renderer is not None:
            await self.renderer.close()

    def check_room(self) -> None:
        """Turn a request away before its prompt is looked at, where there is no room for anything.

        Raises:
            Busy: see `Admission.enter`.
        """
        self._enter(0)

    def answer(self, job: Job) -> AnswerResponse:
        """Take room for a job and hand it to the engine, with nothing in between.

        Raises:
            Fault: it asks for too many answers at once (400).
            Busy: see `Admission.enter`.
        """
        if job.num_answers > MAX_SEQUENCES:
            raise Fault(400, f"too many answers at once; got {job.num_answers}; expected at most {MAX_SEQUENCES}")
        self._enter(job.num_answers)
        try:
            ticket = self.engine.submit(job.prompts, job.params, adapter=job.adapter, on_ended=self.admission.leave)
        except BaseException:
            self.admission.leave(job.num_answers)
            raise
        form = ChatForm(job, self.texts) if job.kind == "chat" else CompletionForm(job, self.texts)
        return AnswerResponse(job, form, engine=self.engine, ticket=ticket, metrics=self.metrics)

    def _enter(self, count: int) -> None:
        try:
            self.admission.enter(count, ready=self.engine.state == "ready")
        except Busy as busy:
            self.metrics.rejections.labels(busy.reason).inc()
            raise

    def readiness(self) -> tuple[bool, str]:
        """Whether requests are taken now, and in one word why not."""
        if self.admission.draining:
            return False, "draining"
        return self.engine.state == "ready", self.engine.state


def _renderer(tokenizer: Tokenizer | None, settings: ServeSettings) -> TemplateRenderer | None:
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    return TemplateRenderer(
        tokenizer.chat_template,
        tokenizer.special_tokens,
        source=tokenizer.source,
        timeout_s=settings.template_timeout_s,
    )
