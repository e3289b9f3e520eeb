"""`bench`: how fast an engine runs a model, alone or in turn with another engine."""

from __future__ import annotations

from burnish.engine.protocol import Engine
from burnish.errors import ConfigError
from burnish.measure.bench import BenchResult, VersusResult, Workload, run_bench, run_versus
from burnish.measure.memory import resident_bytes
from burnish.models.adapter_files import is_adapter_folder
from burnish.models.checkpoint import read_config
from burnish.models.loading import load_config, resolve_model
from burnish.pipeline.opening import EngineOptions, Source, open_engine
from burnish.pipeline.progress import Progress, silent
from burnish.plan.source import quantization_label


def bench(
    model: str,
    *,
    workload: Workload | None = None,
    engine: str = "native",
    versus: str | None = None,
    versus_model: str | None = None,
    versus_quantize: str = "none",
    adapter: str | None = None,
    repeats: int = 3,
    warmup: int = 1,
    options: EngineOptions | None = None,
    source: Source | None = None,
    progress: Progress = silent,
) -> BenchResult | VersusResult:
    """Measure throughput, latency and memory.

    Args:
        model: folder, bundled name, hub id or adapter's folder; for "ctranslate2" a folder of its converter's; for
            "openai:URL" the model whose vocabulary prompts are drawn from.
        workload: prompts and concurrency; 128 in, 128 out, one at a time when None.
        engine: "native", "transformers", "ctranslate2" or "openai:URL".
        versus: another engine to run in turn with the first, in the same run.
        versus_model: what the other engine runs; `model` when None.
        versus_quantize: the other engine's `quantize`.
        repeats: measured passes over the workload.
        warmup: passes before that which are not measured.
        options: of the first engine; the other shares `kv_cache`. A server has its own, and its own of `source`.

    Raises:
        ConfigError, CheckpointError: bad input.
    """
    workload, source, options = workload or Workload(), source or Source(), options or EngineOptions()
    if repeats < 1 or warmup < 0:
        raise ConfigError(
            "repeats or warmup is out of range", got=f"{repeats} and {warmup}", expected="at least 1 and 0"
        )
    if versus is None and (versus_model is not None or versus_quantize != "none"):
        raise ConfigError("there is no other engine for --vs-model and --vs-quantize", remedy="Name it with --vs.")
    length = workload.input_tokens + workload.output_tokens
    baseline = resident_bytes()

    def opened(name: str, run: str, chosen: EngineOptions) -> tuple[Engine, str | None]:
        is_server = name.startswith("openai:")
        made = open_engine(
            run,
            Source() if is_server and versus is not None else source,
            adapter=adapter,
            engine=name,
            max_num_seqs=workload.concurrency,
            max_model_len=length,
            options=chosen,
        )
        return made, None if is_server else running_quantization(made, run, source)

    def on_progress(done: int, total: int) -> None:
        progress("Measuring", done, total)

    first, quantization = opened(engine, model, options)
    vocab_size = None
    if engine.startswith("openai:"):
        folder = resolve_model(model, revision=source.revision, offline=source.offline)
        vocab_size = load_config(folder).vocab_size
    if versus is not None:
        second, other = opened(
            versus, versus_model or model, EngineOptions(quantize=versus_quantize, kv_cache=options.kv_cache)
        )
        return run_versus(
            first,
            second,
            workload,
            model=model,
            quantization=(quantization, other),
            vocab_size=vocab_size,
            repeats=repeats,
            warmup=warmup,
            on_progress=on_progress,
        )
    return run_bench(
        first,
        workload,
        model=model,
        quantization=quantization,
        vocab_size=vocab_size,
        repeats=repeats,
        warmup=warmup,
        baseline_bytes=baseline,
        on_progress=on_progress,
    )


def running_quantization(engine: Engine, model: str, source: Source) -> str | None:
    """How the weights that an engine runs are quantized ("int8", "gptq-4bit"); None for dense ones."""
    report = getattr(engine, "optimised", None)
    if report is not None and report.quantize != "none":
        return str(report.quantize)
    stats = engine.stats()
    if stats.engine == "ctranslate2":
        return stats.dtype.partition("_")[0] if stats.dtype.startswith("int") else None
    return quantization_of(model, source)


def quantization_of(model: str, source: Source) -> str | None:
    """How a model's weights are quantized in its files ("gptq-4bit"), None for dense ones."""
    if is_adapter_folder(model):
        return None
    folder = resolve_model(model, revision=source.revision, offline=source.offline, allow_pickle=source.allow_pickle)
    return quantization_label(read_config(folder))
