"""What Prometheus reads: load, latencies, tokens, refusals, and what befell the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from burnish.serve.admission import Admission
from burnish.serve.engine_client import EngineClient
from burnish.serve.feedback import Feedback
from burnish.serve.jobs import Answer, Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server, and the readings of its engine.

    Args:
        engine, admission: asked whenever somebody reads.
    """

    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "burnish_requests",
            "Requests that reached the engine, by how they ended: ok, gone (the client left), refused or failed.",
            ["kind", "model", "outcome"],
            registry=registry,
        )
        self.answers = Counter(
            "burnish_answers", "Answers by the reason they ended.", ["model", "finish_reason"], registry=registry
        )
        self.rejections = Counter(
            "burnish_rejections",
            "Requests turned away: full (429), draining or not_ready (503), unauthorized (401).",
            ["reason"],
            registry=registry,
        )
        self.ttft = Histogram(
            "burnish_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tpot = Histogram(
            "burnish_time_per_output_token_seconds",
            "Mean time per token after the first.",
            ["model"],
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.e2e = Histogram(
            "burnish_request_seconds",
            "From a request's arrival to its end, of requests that ended well.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "burnish_prompt_tokens", "Tokens of prompts whose answers began.", ["model"], registry=registry
        )
        self.output_tokens = Counter(
            "burnish_output_tokens", "Tokens of answers that ended well.", ["model"], registry=registry
        )
        self.cut_readers = Counter(
            "burnish_cut_connections", "Connections cut: slow_reader or idle.", ["reason"], registry=registry
        )
        self.feedback = Feedback()
        registry.register(self.feedback)  # type: ignore[arg-type]
        registry.register(_EngineReadings(engine, admission))  # type: ignore[arg-type]
        self._listeners: list[Callable[[Job, Answer, float], None]] = [self.feedback.on_answer]

    def listen(self, listener: Callable[[Job, Answer, float], None]) -> None:
        """Have somebody told of every answer that ended: its job, itself, seconds between its first and last token."""
        self._listeners.append(listener)

    def began(self, job: Job, ttft_s: float) -> None:
        """A job's first token is there."""
        self.ttft.labels(job.model).observe(ttft_s)
        self.prompt_tokens.labels(job.model).inc(job.prompt_tokens)

    def answered(self, job: Job, answer: Answer, decode_s: float) -> None:
        """An answer ended with a reason of its own."""
        self.answers.labels(job.model, answer.finish_reason).inc()
        self.output_tokens.labels(job.model).inc(answer.num_tokens)
        if answer.num_tokens > 1:
            self.tpot.labels(job.model).observe(decode_s / (answer.num_tokens - 1))
        for listener in self._listeners:
            listener(job, answer, decode_s)

    def ended(self, job: Job, outcome: str, seconds: float) -> None:
        """A job is over."""
        self.requests.labels(job.kind, job.model, outcome).inc()
        if outcome == "ok":
            self.e2e.labels(job.model).observe(seconds)

    def exposition(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineReadings:
    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[Any]:
        engine, stats = self._engine, self._engine.stats
        gauges = [
            ("burnish_engine_up", "1 while the engine takes requests.", int(engine.state == "ready")),
            ("burnish_admitted_answers", "Answers let in and not ended.", self._admission.held),
            ("burnish_capacity_answers", "Answers that are let in at most.", self._admission.capacity),
        ]
        if stats is not None:
            gauges += [
                ("burnish_running_answers", "Answers in the batch.", stats.running),
                ("burnish_queued_answers", "Answers that wait for a place in it.", stats.waiting),
                ("burnish_kv_blocks", "Blocks of the KV cache.", stats.kv_blocks),
                ("burnish_kv_blocks_used", "Blocks that running answers hold.", stats.kv_blocks_used),
                ("burnish_kv_blocks_cached", "Blocks kept for prompts that begin alike.", stats.kv_blocks_cached),
                (
                    "burnish_kv_used_ratio",
                    "Share of the blocks in use.",
                    stats.kv_blocks_used / max(1, stats.kv_blocks),
                ),
                ("burnish_weights_bytes", "Memory of the weights.", stats.weights_bytes),
                ("burnish_kv_bytes", "Memory of the KV cache.", stats.kv_bytes),
                ("burnish_engine_tokens_per_second", "Tokens produced over the last seconds.", stats.tokens_per_s),
            ]
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counters = [
            ("burnish_preemptions", "Answers that lost their blocks to older ones.", "preemptions"),
            ("burnish_prefix_hit_tokens", "Prompt tokens that needed no computing.", "prefix_hit_tokens"),
            ("burnish_engine_steps", "Batches computed.", "steps"),
            ("burnish_engine_output_tokens", "Tokens produced, of answers nobody waited for as well.", "output_tokens"),
        ]
        for name, text, counter in counters:
            yield CounterMetricFamily(name, text, value=engine.counted(counter))
        yield CounterMetricFamily(
            "burnish_engine_restarts", "Times the engine was started anew.", value=engine.restarts
        )
