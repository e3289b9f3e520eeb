"""`tune --dry-run`: everything up to the first step, and a trial of one; trains nothing and writes nothing to OUT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from burnish.engine.memory_budget import parse_bytes
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source, open_decoder, read_without_weights
from burnish.pipeline.predicted import as_measured, rows_of_run
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.training_data import EvaluationChoice, training_data
from burnish.pipeline.tune_fit import Fitting, try_out
from burnish.train.config import TrainConfig
from burnish.train.fitting import in_words
from burnish.train.freezing import BASE_FORMATS
from burnish.train.inputs import order_of_rows, total_steps, total_tokens
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.precision import dtype_to_load, resolve_precision


@dataclass(frozen=True, kw_only=True)
class RehearsalRecord:
    """What `burnish tune --dry-run --json` prints.

    Bytes are those that loading and training add to a process with its libraries (on CUDA, the allocator's), as in
    `TuneRecord`; `start_bytes` were there before. `predicted_components` are those of a run's record,
    `predicted_parts` what they are made of. `setting` is how a step would be cut up, in words; `fit` is what was chosen
    for a budget, None without one. `seconds` is an estimate: all tokens at the probe's rate, which counts neither
    evaluations nor updates.
    """

    base: str
    method: str
    precision: str
    dtype: str
    setting: str
    num_examples: int
    num_too_long: int
    longest: int
    steps: int
    tokens: int
    predicted_peak_bytes: int
    predicted_components: dict[str, int]
    predicted_parts: dict[str, int]
    start_bytes: int
    measured_peak_bytes: int
    tokens_per_s: float
    probe_tokens: int
    seconds: float
    fit: dict[str, Any] | None = None


def rehearse(
    model: str,
    *,
    data: DataConfig,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    eval_data: str | None = None,
    eval_split: float | None = None,
    streaming: bool = False,
    memory: str | int | None = None,
    source: Source | None = None,
    progress: Progress = silent,
) -> RehearsalRecord:
    """What `tune` would do with these arguments; they and its errors are `tune`'s."""
    lora, config, source = lora or LoraConfig(), config or TrainConfig(), source or Source()
    tokenizer, shape = read_without_weights(model, source)
    rows = training_data(
        data,
        tokenizer,
        longest=shape.max_position_embeddings,
        vocab_size=shape.vocab_size,
        evaluation=EvaluationChoice(source=eval_data, split=eval_split),
        streaming=streaming,
        seed=config.seed,
        progress=progress,
    )
    counted = rows_of_run(rows.examples, config)
    fitting = Fitting(shape, counted, config, lora, source)
    fit = None
    if memory is not None:
        config, fit = fitting.choose(parse_bytes(memory, name="memory"))
        source = replace(source, dtype=fit.dtype)
    elif source.dtype == "auto":
        source = replace(source, dtype=dtype_to_load(config, source.device))
    opened = open_decoder(model, source, frozen=BASE_FORMATS.get(config.method))
    if config.method != "full":
        attach_lora(opened.decoder, lora, seed=config.seed)
    fitting.dtype = dtype = str(opened.decoder.dtype).removeprefix("torch.")
    if fit is not None:
        config, fit = fitting.try_out(config, fit, decoder=opened.decoder, examples=rows.examples)
    precision = resolve_precision(opened.decoder, config)
    step = [rows.examples[row] for row in counted.largest_step]
    result = try_out(opened.decoder, step, config, state_bytes=fitting.state_bytes(config))
    order = order_of_rows(rows.examples, config)
    steps = total_steps(order, config)
    tokens = total_tokens(order, steps=steps)
    parts = fitting.components(config)
    return RehearsalRecord(
        base=opened.name,
        method=config.method,
        precision=precision,
        dtype=dtype,
        setting=in_words(config, precision=precision, device=opened.decoder.device.type),
        num_examples=len(rows.examples),
        num_too_long=rows.num_too_long,
        longest=counted.longest,
        steps=steps,
        tokens=tokens,
        predicted_peak_bytes=sum(parts.values()),
        predicted_components=as_measured(parts),
        predicted_parts=parts,
        start_bytes=fitting.start_bytes,
        measured_peak_bytes=max(0, result.peak_bytes - fitting.start_bytes),
        tokens_per_s=result.tokens_per_s,
        probe_tokens=result.tokens,
        seconds=tokens / result.tokens_per_s,
        fit=None if fit is None else fit.to_dict(),
    )
