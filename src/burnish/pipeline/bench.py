"""`bench`: how fast an engine runs a model, alone or in turn with another engine."""

from __future__ import annotations

from burnish.errors import ConfigError
from burnish.measure.bench import BenchResult, VersusResult, Workload, run_bench, run_versus
from burnish.measure.memory import resident_bytes
from burnish.models.checkpoint import read_config
from burnish.models.loading import resolve_model
from burnish.pipeline.opening import Source, open_engine
from burnish.pipeline.progress import Progress, silent
from burnish.train.adapter import is_adapter_folder


def bench(
    model: str,
    *,
    workload: Workload | None = None,
    engine: str = "native",
    versus: str | None = None,
    adapter: str | None = None,
    repeats: int = 3,
    warmup: int = 1,
    kv_cache: bool = True,
    source: Source | None = None,
    progress: Progress = silent,
) -> BenchResult | VersusResult:
    """Measure throughput, latency and memory.

    Args:
        model: folder, bundled name, hub id or adapter's folder.
        workload: prompts and concurrency; 128 in, 128 out, one at a time when None.
        engine: "native" or "transformers".
        versus: another engine to run in turn with the first, in the same run.
        repeats: measured passes over the workload.
        warmup: passes before that which are not measured.
        kv_cache: False recomputes every token, to show what the cache is worth.

    Raises:
        ConfigError, CheckpointError: bad input.
    """
    workload, source = workload or Workload(), source or Source()
    if repeats < 1 or warmup < 0:
        raise ConfigError(
            "repeats or warmup is out of range", got=f"{repeats} and {warmup}", expected="at least 1 and 0"
        )
    length = workload.input_tokens + workload.output_tokens
    baseline = resident_bytes()

    def opened(name: str):
        return open_engine(
            model,
            source,
            adapter=adapter,
            engine=name,
            max_num_seqs=workload.concurrency,
            max_model_len=length,
            kv_cache=kv_cache,
        )

    def on_progress(done: int, total: int) -> None:
        progress("Measuring", done, total)

    quantization = quantization_of(model, source)
    first = opened(engine)
    if versus is not None:
        return run_versus(
            first,
            opened(versus),
            workload,
            model=model,
            quantization=(quantization, quantization),
            repeats=repeats,
            warmup=warmup,
            on_progress=on_progress,
        )
    return run_bench(
        first,
        workload,
        model=model,
        quantization=quantization,
        repeats=repeats,
        warmup=warmup,
        baseline_bytes=baseline,
        on_progress=on_progress,
    )


def quantization_of(model: str, source: Source) -> str | None:
    """How a model's weights are quantized ("gptq-4bit"), None for a dense one."""
    if is_adapter_folder(model):
        return None
    folder = resolve_model(model, revision=source.revision, offline=source.offline, allow_pickle=source.allow_pickle)
    config = read_config(folder).get("quantization_config")
    if not isinstance(config, dict):
        return None
    bits = config.get("bits")
    return f"{config.get('quant_method', 'quantized')}-{bits}bit" if bits else str(config.get("quant_method"))
