"""`burnish chat`: a conversation in a terminal or through a pipe."""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from burnish.cli.output import counted, stderr, to_plain
from burnish.cli.show_engine import optimised_lines
from burnish.data.rows import Row
from burnish.data.templates import Template, pick_template
from burnish.data.tokenizer import Tokenizer
from burnish.engine.outputs import EngineStats, RequestMetrics, RequestOutput
from burnish.engine.protocol import Engine
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, ConfigError
from burnish.measure.formatting import format_bytes, format_milliseconds, format_rate, format_seconds
from burnish.measure.memory import MemoryMeter, resident_bytes
from burnish.models.adapter_files import is_adapter_folder
from burnish.models.resolve import resolve_model
from burnish.pipeline.opening import (
    EngineOptions,
    Source,
    data_of,
    engine_of,
    open_decoder,
    open_engine,
    recorded_data,
    required_tokenizer,
)

HELP = """\
/help            this list
/context TEXT    put TEXT (say, a schema) before every question, or clear it
/system TEXT     set the system message, or clear it
/reset           forget the conversation
/stats           figures of the session
/quit            leave (also Ctrl-D)
A backslash at its end continues a line in the next. Ctrl-C stops an answer."""
NO_SYSTEM = "this model's prompts have no place for a system message"


@dataclass(frozen=True, kw_only=True)
class OpenedChat:
    """An engine that is warm, and how prompts are put to it.

    `template` is None where the text goes in as it is; `single_turn` models were tuned on questions that stand alone.
    """

    engine: Engine
    tokenizer: Tokenizer
    template: Template | None
    single_turn: bool
    model: str
    loaded_s: float


def open_chat(
    model: str,
    source: Source,
    *,
    adapter: str | None,
    engine: str,
    options: EngineOptions,
    template: str,
    quiet: bool,
) -> OpenedChat:
    """Load, optimise and warm up, telling how long each took.

    Raises:
        ConfigError, CheckpointError: bad input.
    """
    started = time.perf_counter()
    recorded: dict[str, Any] | None = None
    if engine == "native" and (adapter is not None or is_adapter_folder(model)) and not options.sharded:
        opened = open_decoder(
            model, source, adapter=adapter, quantize=options.quantize, weights_cache=options.weights_cache
        )
        tokenizer, recorded = opened.tokenizer, data_of(opened)
        running: Engine = engine_of(opened, max_num_seqs=1, options=options)
    else:
        running = open_engine(model, source, adapter=adapter, engine=engine, max_num_seqs=1, options=options)
        folder = resolve_model(model, revision=source.revision, offline=source.offline)
        tokenizer, recorded = required_tokenizer(folder), recorded_data(folder)
    loaded_s = time.perf_counter() - started
    running.warm_up()
    stats = running.stats()
    if not quiet:
        for line in (*_opening_lines(model, stats, loaded_s), *optimised_lines(running)):
            stderr().print(line, markup=False, soft_wrap=True)
    name = template
    if name == "auto" and recorded and recorded.get("template"):
        name = str(recorded["template"])
    chosen = pick_template(name, tokenizer) if name != "auto" or tokenizer.chat_template is not None else None
    single = recorded is not None and not recorded.get("multi_turn", False)
    return OpenedChat(
        engine=running, tokenizer=tokenizer, template=chosen, single_turn=single, model=model, loaded_s=loaded_s
    )


def _opening_lines(model: str, stats: EngineStats, loaded_s: float) -> Iterator[str]:
    facts = [f"{stats.engine} engine", f"{stats.dtype} on {stats.device}" if stats.dtype else stats.device]
    facts += [_threads(stats.threads)] if stats.threads else []
    facts += [f"{format_bytes(stats.weights_bytes)} of weights"] if stats.weights_bytes else []
    yield f"{model}: {', '.join(facts)}"
    yield (
        f"load {format_seconds(loaded_s - stats.optimise_s)}, optimise {format_seconds(stats.optimise_s)}, "
        f"warm-up {format_seconds(stats.warmup_s)}"
    )


@dataclass
class ChatSession:
    """One conversation."""

    opened: OpenedChat
    params: SamplingParams
    system: str | None = None
    context: str | None = None
    json: bool = False
    quiet: bool = False
    _turns: list[dict[str, str]] = field(default_factory=list)
    _done: list[RequestMetrics] = field(default_factory=list)

    @property
    def takes_system(self) -> bool:
        """Only a chat template has a place for a system message."""
        return self.opened.template is not None and self.opened.template.name == "chat"

    def __post_init__(self) -> None:
        if self.system and not self.takes_system:
            raise ConfigError(NO_SYSTEM)

    def run(self, source: TextIO) -> int:
        """Read prompts until the end of input; returns the exit code."""
        interactive = source.isatty()
        if interactive and not self.quiet:
            how = (
                "Each question stands alone, as the model was tuned."
                if self.opened.single_turn
                else "The conversation is remembered."
            )
            stderr().print(f"{how} /help lists commands.", style="dim")
        with MemoryMeter() as meter:
            while True:
                try:
                    prompt = self._read(source, interactive)
                except KeyboardInterrupt:
                    # At an empty prompt Ctrl-C means nothing is to be stopped; say how to leave instead of leaving.
                    self._say("\n(Ctrl-D or /quit leaves)")
                    continue
                if prompt is None:
                    return 0
                if prompt.startswith("/"):
                    if self._command(prompt, meter):
                        return 0
                    continue
                try:
                    self._answer(prompt, meter)
                except BurnishError as error:
                    if not interactive:
                        raise
                    self._say(f"error: {error.message}")

    def _read(self, source: TextIO, interactive: bool) -> str | None:
        """The next prompt without its line end; None at the end of input; empty lines are passed over."""
        lines: list[str] = []
        while True:
            mark = "... " if lines else "> "
            try:
                line = input(mark if interactive else "") if source is sys.stdin else source.readline()
                if source is not sys.stdin and not line:
                    raise EOFError
            except EOFError:
                if interactive:
                    self._say("")
                return "\n".join(lines).strip() or None
            line = line.rstrip("\n")
            if line.endswith("\\"):
                lines.append(line[:-1])
                continue
            lines.append(line)
            prompt = "\n".join(lines).strip()
            if prompt:
                return prompt
            lines.clear()

    def _command(self, line: str, meter: MemoryMeter) -> bool:
        """Obey a /command; True leaves."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return True
        if name == "/help":
            self._say(HELP)
        elif name == "/reset":
            self._turns.clear()
            self._say("forgotten")
        elif name == "/system":
            if rest and not self.takes_system:
                self._say(NO_SYSTEM)
                return False
            self.system = rest or None
            self._turns.clear()
            self._say("system message set" if rest else "no system message")
        elif name == "/context":
            self.context = rest or None
            self._turns.clear()
            self._say("context set" if rest else "no context")
        elif name == "/stats":
            self._say(self._statistics(meter))
        else:
            self._say(f"there is no {name}; /help lists what there is")
        return False

    def _prompt(self, text: str) -> Any:
        """What the engine is given: text, or chat messages."""
        template = self.opened.template
        if template is None:
            return f"{self.context}\n{text}" if self.context else text
        if template.name != "chat":
            return template.render_prompt(
                Row(instruction=text, context=self.context or "", answer="", extra={}, file="chat", number=0),
                self.opened.tokenizer,
            )
        content = f"{self.context}\n\n{text}" if self.context and not self._turns else text
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, *self._turns, {"role": "user", "content": content}]

    def _answer(self, text: str, meter: MemoryMeter) -> None:
        prompt = self._prompt(text)
        stream = self.opened.engine.stream(prompt, self.params)
        output: RequestOutput | None = None
        pieces: list[str] = []
        started = time.perf_counter()
        try:
            for event in stream:
                pieces.append(event.text)
                if not self.json:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                output = event.output or output
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]
        answer = "".join(pieces)
        if not self.json:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if output is None:
            self._say(f"stopped after {format_seconds(time.perf_counter() - started)}")
            return
        self._done.append(output.metrics)
        if not self.opened.single_turn and isinstance(prompt, list):
            self._turns += [prompt[-1], {"role": "assistant", "content": answer}]
        if self.json:
            record = {
                "text": output.text,
                "finish_reason": output.finish_reason,
                "metrics": self._figures(output.metrics, meter),
            }
            sys.stdout.write(json_format.dumps(to_plain(record), ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            self._say(self._line(output.metrics, meter))

    def _figures(self, metrics: RequestMetrics, meter: MemoryMeter) -> dict[str, Any]:
        return {
            "prompt_tokens": metrics.prompt_tokens,
            "output_tokens": metrics.output_tokens,
            "ttft_ms": metrics.ttft_ms,
            "tpot_ms": metrics.tpot_ms,
            "e2e_ms": metrics.e2e_ms,
            "total_tokens_per_s": _rate(metrics),
            "peak_memory_bytes": max(meter.peak_bytes, resident_bytes()),
        }

    def _line(self, metrics: RequestMetrics, meter: MemoryMeter) -> str:
        return (
            f"[{metrics.prompt_tokens} tokens in, {metrics.output_tokens} out | "
            f"TTFT {format_milliseconds(metrics.ttft_ms)} | "
            f"TPOT {format_milliseconds(metrics.tpot_ms)} | {format_rate(_rate(metrics))} tokens/s in + out | "
            f"peak memory {format_bytes(max(meter.peak_bytes, resident_bytes()))}]"
        )

    def _statistics(self, meter: MemoryMeter) -> str:
        stats = self.opened.engine.stats()
        prompts = sum(metrics.prompt_tokens for metrics in self._done)
        outputs = sum(metrics.output_tokens for metrics in self._done)
        seconds = sum(metrics.e2e_ms for metrics in self._done) / 1e3
        rate = format_rate((prompts + outputs) / seconds if seconds else None)
        return (
            counted(len(self._done), "answer") + f", {prompts} tokens in, {outputs} out, {rate} tokens/s in + out\n"
            f"weights {format_bytes(stats.weights_bytes)}, KV {format_bytes(stats.kv_bytes)}, "
            f"peak memory {format_bytes(max(meter.peak_bytes, resident_bytes()))}\n"
            f"{stats.drafted_tokens} tokens guessed, {stats.accepted_tokens} of them right "
            f"(speculation {stats.speculation})\n"
            f"{stats.engine} engine, {stats.dtype}, {_threads(stats.threads)}, "
            f"load {format_seconds(self.opened.loaded_s)}, optimise {format_seconds(stats.optimise_s)}, "
            f"warm-up {format_seconds(stats.warmup_s)}"
        )

    def _say(self, text: str) -> None:
        if not self.quiet:
            stderr().print(text, style="dim", soft_wrap=True)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _rate(metrics: RequestMetrics) -> float | None:
    return (metrics.prompt_tokens + metrics.output_tokens) * 1e3 / metrics.e2e_ms if metrics.e2e_ms else None
