"""`tune`: rows in, an adapter (or a fully tuned model) out, with every step on record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.loading import save_decoder
from burnish.pipeline.examples import DataConfig, Prepared, prepare
from burnish.pipeline.manifest import write_manifest
from burnish.pipeline.opening import Opened, Source, check_output, open_decoder
from burnish.pipeline.predicted import predicted_training_peak
from burnish.pipeline.progress import Progress, silent
from burnish.train.adapter import save_adapter
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.results import StepRecord, TrainResult, recent_loss
from burnish.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class TuneRecord:
    """What `burnish tune --json` prints. Bytes are of the process; `loaded` and `peak` are over its start."""

    adapter: str
    base: str
    method: str
    precision: str
    device: str
    stopped: str
    seconds: float
    tokens_per_s: float
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    loaded_memory_bytes: int
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    component_bytes: dict[str, int]
    trained_parameters: int
    num_examples: int
    num_bad_rows: int
    num_too_long: int
    bad_rows: list[str] = field(default_factory=list)
    skipped_steps: int = 0

    @property
    def interrupted(self) -> bool:
        return self.stopped == "interrupted"


def tune(
    model: str,
    *,
    data: DataConfig,
    out: str | Path,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    eval_data: str | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TuneRecord:
    """Tune a model and write the adapter (method "lora") or the whole model (method "full") to `out`.

    Ctrl-C stops after the step at hand; what was learned until then is written, and the record says "interrupted".

    Args:
        model: folder, bundled name or hub id.
        data: training rows.
        out: folder for the result.
        lora: the adapter's shape; `LoraConfig()` when None.
        config: the training loop's settings; `TrainConfig()` when None.
        eval_data: rows for the evaluation loss, rendered as the training rows are; later gates use them too.
        source: dtype, device and threads.
        overwrite: write into a folder that holds something.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, found before training begins.
    """
    lora, config, source = lora or LoraConfig(), config or TrainConfig(), source or Source()
    folder = check_output(out, overwrite=overwrite)
    with MemoryMeter() as meter:
        opened = open_decoder(model, source)
        if opened.adapter is not None:
            raise ConfigError(
                f"{model} is an adapter", expected="a base model to tune", remedy="Merge it first: burnish merge"
            )
        loaded_bytes = max(0, meter.growth_bytes)
        prepared = prepare(data, opened.tokenizer, longest=opened.decoder.config.max_position_embeddings)
        evaluation = _evaluation(eval_data, data, prepared, opened)
        if config.method == "lora":
            attach_lora(opened.decoder, lora, seed=config.seed)
        statistics = prepared.examples.stats
        predicted = predicted_training_peak(
            opened.decoder,
            config=config,
            lora=lora,
            longest=statistics.tokens_max,
            label_tokens=statistics.label_tokens_total // statistics.num_examples,
        )
        result = _train(opened, prepared, evaluation, config, meter, progress)
        trained = sum(p.numel() for p in opened.decoder.parameters() if p.requires_grad)
        _save(opened, folder, lora, config)
    record = TuneRecord(
        adapter=str(folder),
        base=opened.name,
        method=config.method,
        precision=result.precision,
        device=str(opened.decoder.device),
        stopped=result.stopped,
        seconds=result.seconds,
        tokens_per_s=result.tokens_per_s,
        steps=[asdict(step) for step in result.steps],
        evals=[to_plain(item) for item in result.eval],
        loaded_memory_bytes=loaded_bytes,
        peak_memory_bytes=meter.growth_bytes,
        predicted_peak_bytes=predicted,
        component_bytes=_components(result),
        trained_parameters=trained,
        num_examples=len(prepared.examples),
        num_bad_rows=len(prepared.rows.bad_rows),
        num_too_long=len(prepared.examples.too_long),
        bad_rows=[str(row) for row in prepared.rows.bad_rows[:20]],
        skipped_steps=result.skipped_steps,
    )
    figures = {name: value for name, value in asdict(record).items() if name not in ("adapter", "base", "bad_rows")}
    write_manifest(
        folder,
        kind="adapter" if config.method == "lora" else "tuned",
        inputs={"base": opened.as_input()},
        config={"train": config, "lora": lora if config.method == "lora" else None},
        data={
            **asdict(data),
            "template": prepared.template.name,
            "eval_source": eval_data,
            "multi_turn": any("messages" in row.extra for row in prepared.rows.rows),
        },
        figures=figures,
        tokenizer=opened.tokenizer,
    )
    return record


def _evaluation(eval_data: str | None, data: DataConfig, prepared: Prepared, opened: Opened) -> Prepared | None:
    if eval_data is None:
        return None
    config = DataConfig(
        source=eval_data,
        template=prepared.template.name,
        columns=data.columns,
        max_length=data.max_length,
        too_long=data.too_long,
        check_sql=data.check_sql,
        seed=data.seed,
        offline=data.offline,
    )
    return prepare(config, opened.tokenizer, longest=opened.decoder.config.max_position_embeddings)


def _train(
    opened: Opened,
    prepared: Prepared,
    evaluation: Prepared | None,
    config: TrainConfig,
    meter: MemoryMeter,
    progress: Progress,
) -> TrainResult:
    total = _planned_steps(config, len(prepared.examples))
    steps: list[StepRecord] = []
    label = f"Tuning on {len(prepared.examples)} rows"

    def on_step(step: StepRecord) -> None:
        steps.append(step)
        done, note = step.step, f"loss {recent_loss(steps):.3f}"
        if config.max_seconds is not None:
            elapsed = sum(item.seconds for item in steps)
            done = max(done, int(total * min(1.0, elapsed / config.max_seconds)))
        progress(label, min(done, total), total, note)

    return train(
        opened.decoder,
        prepared.examples.examples,
        config=config,
        eval_examples=None if evaluation is None else evaluation.examples.examples,
        on_step=on_step,
        meter=meter,
    )


def _components(result: TrainResult) -> dict[str, int]:
    """Memory by part. The meter began before the weights were loaded, so they come off what is left for activations."""
    parts = dict(result.component_bytes)
    parts["activations"] = max(0, parts["activations"] - parts["weights"])
    return parts


def _planned_steps(config: TrainConfig, num_rows: int) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, round((config.epochs or 1.0) * num_rows / config.rows_per_step))


def _save(opened: Opened, folder: Path, lora: LoraConfig, config: TrainConfig) -> None:
    if config.method == "lora":
        save_adapter(opened.decoder, folder, base=opened.name, config=lora)
    else:
        save_decoder(opened.decoder, folder, source=opened.folder)
