"""A model as the page compares it: which weights it has, how it is asked, and what it takes of the memory."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.data.templates import TEMPLATES
from burnish.engine.prompts import EncodedPrompt
from burnish.errors import RequestError
from burnish.serve.compare_prompt import Asked
from burnish.serve.schema import Message
from burnish.serve.service import ServedModel, Service

_SHORT_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One column of the page.

    Attributes:
        name: as people tell it from the others.
        model: which of the service's models it is.
        digest: SHA-256 over all of its weights, hexadecimal; see `pipeline.comparing.weights_digest`.
        template: how a question and its context become a prompt; a name of `data.templates`.
        quantize: what loading does to the weights.
    """

    name: str
    model: ServedModel
    service: Service
    digest: str
    template: str
    quantize: str = "none"

    @property
    def fingerprint(self) -> str:
        """The first digits of the model's fingerprint, as the API and manifests have it; of an adapter, its own."""
        return self.model.fingerprint[:_SHORT_DIGITS]

    @property
    def state(self) -> str:
        """Of its engine: "starting", "ready", "restarting", "broken" or "stopped"."""
        return self.service.engine.state

    @property
    def trouble(self) -> str | None:
        """Why it cannot be asked now; None where it can."""
        engine = self.service.engine
        if engine.state == "ready":
            return None
        if engine.error is not None:
            return engine.error.message
        return {"starting": "the model is being loaded", "stopped": "the server is shutting down"}.get(
            engine.state, "the engine failed and is being restarted; try again"
        )

    def about(self) -> str:
        """One line: what kind of model it is, and how it runs."""
        stats = self.service.engine.stats
        parts = [f"adapter on {self.model.parent}"] if self.model.adapter is not None else []
        if self.quantize != "none":
            parts.append(f"{self.quantize} on loading")
        if stats is not None:
            threads = "1 thread" if stats.threads == 1 else f"{stats.threads} threads"
            parts += [stats.dtype, f"{stats.device}, {threads}" if stats.device == "cpu" else stats.device]
        return " · ".join(part for part in parts if part)

    async def encode(self, asked: Asked) -> EncodedPrompt:
        """The prompt as this model reads it.

        Raises:
            RequestError, DataError, WorkerError: it has no tokenizer, or its template refuses the prompt.
        """
        prompting, row = self.service.prompting, asked.row()
        if not row.instruction and not row.context:
            raise RequestError("there is nothing to ask")
        if self.template == "chat":
            content = f"{row.context}\n\n{row.instruction}" if row.context else row.instruction
            return await prompting.of_messages([Message(role="user", content=content)])
        if prompting.tokenizer is None:
            raise RequestError("this model has no tokenizer")
        return await prompting.of_text(TEMPLATES[self.template].render_prompt(row, prompting.tokenizer))

    def memory(self) -> Memory | None:
        """What its engine takes; None before it is loaded."""
        stats = self.service.engine.stats
        if stats is None:
            return None
        return Memory(
            weights_bytes=stats.weights_bytes + stats.adapter_bytes,
            kv_bytes=stats.kv_bytes,
            kv_used_bytes=stats.kv_bytes_used,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An engine's memory in bytes: the weights, the KV cache as it is set aside, and what answers hold of that."""

    weights_bytes: int
    kv_bytes: int
    kv_used_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes
