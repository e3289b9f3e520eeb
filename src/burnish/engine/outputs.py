"""What the engine hands back: text, tokens, the reason it ended, and the request's own timings. Torch-free."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from burnish.engine.sampled import TokenLogprob

FinishReason = Literal["stop", "length", "aborted", "error"]


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Timings of one request, in milliseconds since it arrived (waiting for a slot included).

    Attributes:
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens produced, the end token included.
        ttft_ms: until the first token; None when none was produced.
        tpot_ms: mean time per token after the first, (e2e - ttft) / (n - 1); None below two tokens.
        e2e_ms: until the last token (or the abort).
        itl_ms: the gaps between consecutive tokens.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    itl_ms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer.

    Attributes:
        text: cut before a stop string, without special tokens.
        token_ids: every token produced, an end token included.
        finish_reason: "stop" (end token or stop string), "length", "aborted" or "error".
        logprobs: one entry per token, where they were asked for.
        error: what went wrong with this answer alone, where the reason is "error".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        index: position of its prompt in the call to `generate` (0 for `stream`).
        prompt: the prompt as text; None when it was given as token ids.
        text, token_ids, finish_reason, logprobs, error: the first answer's; see `Completion`.
        metrics: of all answers together.
        choices: every answer, `SamplingParams.n` of them.
        prompt_logprobs: one entry per token of the prompt (None for the first), where they were asked for.
    """

    index: int
    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    metrics: RequestMetrics
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    choices: tuple[Completion, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """A piece of a streamed answer; `output` is set on the last one only.

    The pieces of all events, joined, are `output.text`.
    """

    text: str
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one of several processes in bytes: its weights, its share of the cache, and the process in all."""

    rank: int
    weights_bytes: int
    kv_bytes: int
    resident_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine's size, set-up times and load at this moment.

    Attributes:
        weights_bytes: bytes of the model's tensors, counted once each.
        kv_bytes: bytes of the KV cache as allocated now (memory that was never written to is not yet taken).
        load_s: reading the checkpoint; 0 for a model handed in.
        optimise_s: packing linears.
        warmup_s: the last `warm_up`.
        running, waiting: sequences in the batch, and those queued.
        backend: what computes the steps.
        kv_blocks, kv_blocks_used, kv_blocks_cached: blocks in all, those that running sequences hold, and those kept
            for prompts that begin alike.
        kv_bytes_used: bytes of the blocks that running sequences hold.
        preemptions: times that a sequence lost its blocks to an older one.
        prefix_hit_tokens: prompt tokens that needed no computing.
        steps: steps run so far; `step_s` seconds in all, `backend_s` of them computing the model.
        prompt_tokens, output_tokens: tokens of requests begun, and tokens produced.
        speculation: how the next tokens are guessed: "ngram", "auto" or "off".
        drafted_tokens, accepted_tokens: guesses verified, and right ones among them.
        adapters: names of the adapters served; `adapter_bytes` of matrices in all.
        tokens_per_s: tokens produced per second over the last seconds.
        tensor_parallel, pipeline_parallel: how several processes share the model; weights and cache are then theirs
            together, and `ranks` says what each took when it was ready.
    """

    engine: str
    dtype: str
    device: str
    threads: int
    weights_bytes: int
    kv_bytes: int
    load_s: float
    optimise_s: float
    warmup_s: float
    running: int
    waiting: int
    max_num_seqs: int
    max_model_len: int
    packed_linears: int = 0
    backend: str = ""
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_bytes_used: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    backend_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    speculation: str = "off"
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    adapters: tuple[str, ...] = ()
    adapter_bytes: int = 0
    tokens_per_s: float = 0.0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    ranks: tuple[RankMemory, ...] = ()

    @property
    def overhead_s(self) -> float:
        """Seconds of all steps spent outside the model: scheduling, sampling, text."""
        return self.step_s - self.backend_s

    @property
    def saved_steps(self) -> int:
        """Steps that requests did not have to wait for: each right guess would have been a step of its own."""
        return self.accepted_tokens


def make_metrics(*, prompt_tokens: int, arrival_s: float, token_times_s: list[float], end_s: float) -> RequestMetrics:
    """Turn clock readings (seconds, any common origin) into a request's timings."""
    gaps = tuple((after - before) * 1e3 for before, after in itertools.pairwise(token_times_s))
    last = token_times_s[-1] if token_times_s else end_s
    return RequestMetrics(
        prompt_tokens=prompt_tokens,
        output_tokens=len(token_times_s),
        ttft_ms=(token_times_s[0] - arrival_s) * 1e3 if token_times_s else None,
        tpot_ms=(last - token_times_s[0]) * 1e3 / (len(token_times_s) - 1) if len(token_times_s) > 1 else None,
        e2e_ms=(last - arrival_s) * 1e3,
        itl_ms=gaps,
    )
