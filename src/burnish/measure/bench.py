"""Speed of an engine under a workload: throughput, time to the first token, time per token, memory.

Loading, optimising, warming up and the steady state are timed apart. End tokens end no answer: all have their length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from statistics import median
from typing import Any, Protocol

from burnish.engine.outputs import EngineStats, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, ConfigError
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.intervals import percentiles
from burnish.measure.memory import MemoryMeter


class BenchableEngine(Protocol):
    """The part of the engine protocol that a benchmark needs."""

    def generate(self, prompts: Sequence[Any], params: Any) -> Iterator[RequestOutput]: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of one shape: `num_requests` prompts of `input_tokens` random tokens, `concurrency` at a time."""

    input_tokens: int = 128
    output_tokens: int = 128
    concurrency: int = 1
    num_requests: int | None = None
    """As many as `concurrency` when None."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "concurrency", "num_requests"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name.replace('_', '-')} is out of range", got=value, expected="an integer >= 1")

    @property
    def requests(self) -> int:
        """How many requests one repeat sends."""
        return self.concurrency if self.num_requests is None else self.num_requests

    def prompts(self, vocab_size: int, *, turn: int = 0) -> list[list[int]]:
        """Seeded prompts, others on every pass: neither a prefix cache nor a memory of answers can help."""
        draw = random.Random(f"{self.seed}, pass {turn}")
        return [[draw.randrange(vocab_size) for _ in range(self.input_tokens)] for _ in range(self.requests)]


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One pass over the workload in the steady state."""

    wall_s: float
    input_tokens: int
    output_tokens: int
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    e2e_ms: tuple[float, ...]

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens over the wall clock."""
        return (self.input_tokens + self.output_tokens) / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What `burnish bench --json` prints. Rates and `wall_s` are medians over repeats, latencies are over requests."""

    model: str
    engine: str
    dtype: str
    quantization: str | None
    device: str
    threads: int
    num_requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    seed: int
    load_s: float
    optimise_s: float
    warmup_s: float
    wall_s: float
    total_tokens_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float | None]
    tpot_ms: dict[str, float | None]
    e2e_ms: dict[str, float | None]
    peak_memory_bytes: int
    """Of the process while it served (CUDA: the allocator's peak)."""
    memory_growth_bytes: int
    """The peak over the process before the model was loaded where that is known, else over the start of the run."""
    weights_bytes: int
    kv_bytes: int
    repeats: int
    spread: dict[str, tuple[float, float]]
    """Least and most over repeats of `wall_s` and of both rates."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    optimised: dict[str, Any] | None
    """What loading did to the weights, where the engine tells: see `compress.optimise.OptimiseReport`."""
    runs: tuple[Repeat, ...] = field(repr=False)
    ranks: tuple[dict[str, int], ...] = ()  # of a model that several processes run: `engine.outputs.RankMemory`

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values; of single repeats only the rates are kept."""
        record = asdict(self)
        record["spread"] = {name: list(ends) for name, ends in self.spread.items()}
        record["runs"] = [
            {
                "wall_s": run.wall_s,
                "total_tokens_per_s": run.total_tokens_per_s,
                "output_tokens_per_s": run.output_tokens_per_s,
            }
            for run in self.runs
        ]
        return record


def run_bench(
    engine: BenchableEngine,
    workload: Workload,
    *,
    model: str = "",
    quantization: str | None = None,
    vocab_size: int | None = None,
    repeats: int = 3,
    warmup: int = 1,
    baseline_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Send the workload `warmup` times unmeasured, then `repeats` times measured.

    Args:
        engine: already loaded; its stats say what loading and optimising took.
        model: what to call the model in the result.
        quantization: what to call its quantization; None for dense weights.
        vocab_size: prompts draw their tokens below it; asked of the engine when None.
        baseline_bytes: the process's resident bytes before the model was loaded.
        on_progress: called with passes done and passes in all, warm-up included.

    Raises:
        ConfigError: `repeats` or `warmup` is out of range, or the workload does not fit the engine's context.
        BurnishError: a request ended early or late.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError("repeats or warmup is out of range", got=f"{repeats} and {warmup}", expected=">= 1 and >= 0")
    session = _Session(engine, workload, vocab_size=vocab_size)
    with MemoryMeter(trim=False) as meter:
        started = time.perf_counter()
        for done in range(warmup):
            session.run_once()
            _report(on_progress, done + 1, warmup + repeats)
        warmed_s = time.perf_counter() - started
        runs: list[Repeat] = []
        for done in range(repeats):
            runs.append(session.run_once())
            _report(on_progress, warmup + done + 1, warmup + repeats)
    return _result(
        engine,
        workload,
        runs,
        meter,
        model=model,
        quantization=quantization,
        warmed_s=warmed_s,
        baseline_bytes=baseline_bytes,
    )


class _Session:
    """A workload bound to an engine: new prompts on every pass, the same for every session of the workload."""

    def __init__(self, engine: BenchableEngine, workload: Workload, *, vocab_size: int | None) -> None:
        longest = engine.stats().max_model_len
        needed = workload.input_tokens + workload.output_tokens
        if needed > longest:
            raise ConfigError(
                "the workload does not fit the context",
                got=f"{workload.input_tokens} + {workload.output_tokens} tokens",
                expected=f"at most {longest}",
                remedy="Use shorter --input-tokens or --output-tokens.",
            )
        self.engine = engine
        self.workload = workload
        size = vocab_size or _vocab_size(engine)
        self._prompts = (workload.prompts(size, turn=turn) for turn in count())
        self.params = SamplingParams(max_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)

    def run_once(self) -> Repeat:
        """Send all prompts, `concurrency` at a time, and check that every token asked for came back."""
        prompts = next(self._prompts)
        outputs: list[RequestOutput] = []
        step = self.workload.concurrency
        started = time.perf_counter()
        for begin in range(0, len(prompts), step):
            outputs.extend(self.engine.generate(prompts[begin : begin + step], self.params))
        wall_s = time.perf_counter() - started
        lengths = {output.metrics.output_tokens for output in outputs}
        if len(outputs) != len(prompts) or lengths != {self.workload.output_tokens}:
            raise BurnishError(
                "the engine did not answer the workload in full",
                got=f"{len(outputs)} answers of {sorted(lengths)} tokens",
                expected=f"{len(prompts)} answers of {self.workload.output_tokens} tokens",
            )
        metrics = [output.metrics for output in outputs]
        return Repeat(
            wall_s=wall_s,
            input_tokens=sum(one.prompt_tokens for one in metrics),
            output_tokens=sum(one.output_tokens for one in metrics),
            ttft_ms=tuple(one.ttft_ms for one in metrics if one.ttft_ms is not None),
            tpot_ms=tuple(one.tpot_ms for one in metrics if one.tpot_ms is not None),
            e2e_ms=tuple(one.e2e_ms for one in metrics),
        )


def _vocab_size(engine: Any) -> int:
    model = getattr(engine, "decoder", None) or getattr(engine, "model", None)
    for holder in (engine, getattr(engine, "config", None), getattr(model, "config", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    raise ConfigError("the engine does not say how large its vocabulary is", remedy="Pass vocab_size.")


def _report(on_progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)


def _result(
    engine: BenchableEngine,
    workload: Workload,
    runs: Sequence[Repeat],
    meter: MemoryMeter,
    *,
    model: str,
    quantization: str | None,
    warmed_s: float,
    baseline_bytes: int | None,
) -> BenchResult:
    stats = engine.stats()
    optimised = getattr(engine, "optimised", None)
    names = ("wall_s", "total_tokens_per_s", "output_tokens_per_s")
    figures = {name: [getattr(run, name) for run in runs] for name in names}
    rank_memory = getattr(engine, "rank_memory", None)
    reading = meter.reading()
    start = reading.start_bytes if baseline_bytes is None else baseline_bytes
    return BenchResult(
        model=model,
        engine=stats.engine,
        dtype=stats.dtype,
        quantization=quantization,
        device=stats.device,
        threads=stats.threads,
        num_requests=workload.requests,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        concurrency=workload.concurrency,
        seed=workload.seed,
        load_s=stats.load_s,
        optimise_s=stats.optimise_s,
        warmup_s=stats.warmup_s + warmed_s,
        wall_s=median(figures["wall_s"]),
        total_tokens_per_s=median(figures["total_tokens_per_s"]),
        output_tokens_per_s=median(figures["output_tokens_per_s"]),
        ttft_ms=percentiles([value for run in runs for value in run.ttft_ms]),
        tpot_ms=percentiles([value for run in runs for value in run.tpot_ms]),
        e2e_ms=percentiles([value for run in runs for value in run.e2e_ms]),
        peak_memory_bytes=reading.device_peak_bytes,
        memory_growth_bytes=max(0, reading.peak_bytes - start),
        weights_bytes=stats.weights_bytes,
        kv_bytes=stats.kv_bytes,
        repeats=len(runs),
        spread={name: (min(values), max(values)) for name, values in figures.items()},
        hardware=hardware_record(),
        versions=version_record(),
        optimised=None if optimised is None else optimised.to_dict(),
        runs=tuple(runs),
        ranks=() if rank_memory is None else tuple(asdict(each) for each in rank_memory()),
    )


@dataclass(frozen=True, kw_only=True)
class VersusResult:
    """Two engines on one workload, run in turn. Ratios are first over second, paired repeat by repeat."""

    first: BenchResult
    second: BenchResult
    ratio: dict[str, float]
    ratio_spread: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Both results and their ratios as JSON values."""
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "ratio": self.ratio,
            "ratio_spread": {name: list(ends) for name, ends in self.ratio_spread.items()},
        }


def run_versus(
    first: BenchableEngine,
    second: BenchableEngine,
    workload: Workload,
    *,
    model: str = "",
    quantization: tuple[str | None, str | None] = (None, None),
    vocab_size: int | None = None,
    repeats: int = 3,
    warmup: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> VersusResult:
    """Run two engines A B A B on the same prompts, so that a machine that slows down slows both.

    Both models are in memory all the while: the peak of each is the process's peak while that engine worked.

    Args:
        first, second: already loaded; the vocabulary of the first bounds the prompts.
        model, quantization, vocab_size, repeats, warmup, on_progress: as for `run_bench`, the passes of both counted.

    Raises:
        ConfigError, BurnishError: as `run_bench` does.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError("repeats or warmup is out of range", got=f"{repeats} and {warmup}", expected=">= 1 and >= 0")
    size = vocab_size or _vocab_size(first)
    sessions = [_Session(engine, workload, vocab_size=size) for engine in (first, second)]
    meters = [_KeptPeak(), _KeptPeak()]
    warmed = [0.0, 0.0]
    runs: list[list[Repeat]] = [[], []]
    total = 2 * (warmup + repeats)
    for turn in range(warmup + repeats):
        for side, session in enumerate(sessions):
            started = time.perf_counter()
            with meters[side]:
                run = session.run_once()
            if turn < warmup:
                warmed[side] += time.perf_counter() - started
            else:
                runs[side].append(run)
            _report(on_progress, 2 * turn + side + 1, total)
    results = [
        _result(
            session.engine,
            workload,
            runs[side],
            meters[side].highest,
            model=model,
            quantization=quantization[side],
            warmed_s=warmed[side],
            baseline_bytes=None,
        )
        for side, session in enumerate(sessions)
    ]
    pairs = {
        name: [getattr(a, name) / getattr(b, name) for a, b in zip(*runs)]
        for name in ("wall_s", "total_tokens_per_s", "output_tokens_per_s")
    }
    return VersusResult(
        first=results[0],
        second=results[1],
        ratio={name: median(values) for name, values in pairs.items()},
        ratio_spread={name: (min(values), max(values)) for name, values in pairs.items()},
    )


class _KeptPeak:
    """Meters one side's turns and keeps the meter with the highest peak."""

    def __init__(self) -> None:
        self.highest = MemoryMeter(trim=False)
        self._current = self.highest

    def __enter__(self) -> None:
        self._current = MemoryMeter(trim=False)
        self._current.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._current.__exit__(*details)
        if self._current.peak_bytes >= self.highest.peak_bytes:
            self.highest = self._current
