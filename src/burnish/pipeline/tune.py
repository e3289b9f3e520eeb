"""`tune`: rows in, an adapter (or a fully tuned model) out, with every step on record."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.engine.memory_budget import parse_bytes
from burnish.errors import ConfigError
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.loading import save_decoder
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.manifest import write_manifest
from burnish.pipeline.opening import Opened, Source, check_output, open_decoder, read_without_weights
from burnish.pipeline.predicted import predicted_training, rows_of_run
from burnish.pipeline.progress import Progress, silent, tell_nobody
from burnish.pipeline.resuming import (
    ResumeConfig,
    check_folder,
    is_unfinished,
    open_checkpoints,
    run_environment,
    run_identity,
    unfinished_checkpoint,
)
from burnish.pipeline.runs import save_run
from burnish.pipeline.training_data import EvaluationChoice, TrainingData, training_data
from burnish.pipeline.training_record import tune_run
from burnish.pipeline.tune_fit import Fitting, describe, kept_of
from burnish.pipeline.tune_watch import TuneWatch
from burnish.track.protocol import Tracker
from burnish.train.adapter import save_adapter
from burnish.train.checkpoints import Checkpoint, CheckpointFolder
from burnish.train.config import TrainConfig
from burnish.train.distributed import Ranks, single
from burnish.train.freezing import BASE_FORMATS
from burnish.train.inputs import order_of_rows, total_steps
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.precision import dtype_to_load
from burnish.train.results import TrainResult
from burnish.train.stopping import StopRequest, stop_on_signals
from burnish.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class TuneRecord:
    """What `burnish tune --json` prints.

    All bytes, measured and predicted, are those that loading and training add to a process with its libraries.

    `resumed_from` is the step that the run went on from; `checkpoint` is the newest one left, to go on from or to keep;
    `fit` is what was chosen for a budget of memory (see `tune_fit.Fit`).
    """

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
    predicted_components: dict[str, int]
    component_bytes: dict[str, int]
    trained_parameters: int
    num_examples: int
    num_bad_rows: int
    num_too_long: int
    num_evaluated: int = 0
    preflight: dict[str, Any] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    skipped_steps: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    trace: str | None = None
    operators: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: int | None = None
    best_step: int | None = None
    best_kept: bool = False
    checkpoint: str | None = None
    fit: dict[str, Any] | None = None

    @property
    def interrupted(self) -> bool:
        return self.stopped == "interrupted"

    def figures(self) -> dict[str, float | None]:
        """The run in a few numbers, for a tracker."""
        losses = [item["loss"] for item in self.evals if item["loss"] is not None]
        return {
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "peak_memory_bytes": self.peak_memory_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "trained_parameters": self.trained_parameters,
            "skipped_steps": self.skipped_steps,
            "final_eval_loss": losses[-1] if losses else None,
            "loaded_memory_bytes": self.loaded_memory_bytes,
            **{f"memory.{name}_bytes": size for name, size in self.component_bytes.items()},
            **{f"predicted.{name}_bytes": size for name, size in self.predicted_components.items()},
            **{f"seconds.{name}": seconds for name, seconds in self.phase_seconds.items()},
        }


def _folder_to_forget() -> Path:
    """For the logs of a process that is not the main one; gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="burnish-rank-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tune(
    model: str,
    *,
    data: DataConfig,
    out: str | Path,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    eval_data: str | None = None,
    eval_split: float | None = None,
    streaming: bool = False,
    memory: str | int | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    resume: ResumeConfig | None = None,
    tracker: Tracker | None = None,
    profile: bool = False,
    progress: Progress = silent,
    notify: Callable[[str], None] = tell_nobody,
    ranks: Ranks | None = None,
) -> TuneRecord:
    """Tune a model and write the adapter, or with method "full" the whole model, to `out`.

    The methods "qlora-4bit" and "qlora-8bit" hold the linears of the base's blocks in NF4 or 8 bits while training.

    Ctrl-C and SIGTERM stop after the step at hand; what was learned until then is written, the record says
    "interrupted", and the same call goes on from there. Checkpoints are in `out`/checkpoints until the run is done.

    Args:
        model: folder, bundled name or hub id.
        data: training rows.
        out: folder for the result.
        lora: the adapter's shape; `LoraConfig()` when None.
        config: the training loop's settings; `TrainConfig()` when None.
        eval_data: rows for the evaluation loss, rendered as the training rows are; later gates use them too.
        eval_split: instead of that, a share (below 1) or a number of the rows is kept out of training for it.
        streaming: keep tokenized rows on disk (see `data.token_cache`), for data sets larger than memory.
        memory: most that the run may take ("2GiB", bytes): micro-batches, checkpointing, and where they are "auto" the
            precision and the base's dtype, are chosen to fit (see `tune_fit.py`). `config.rows_per_step` stays.
        source: dtype, device and threads; dtype "auto" is that which the run computes in (see `dtype_to_load`).
        overwrite: write into a folder that holds something; one that holds an unfinished run is resumed without it.
        resume: whether to go on with an unfinished run; `ResumeConfig()` when None.
        tracker: mirrors the run: settings, every step and evaluation, and what came out. It may fail.
        profile: write `out`/trace.json, a Chrome trace of a few steps, and put the dearest operators on record.
        notify: told what people should know while it runs.
        ranks: the processes that train together (see `distributed.joined`); each calls this with the same arguments.
            Only the main one writes, and returns: the others leave with SystemExit once they have trained.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, found before training begins.
        CapacityError: nothing fits into `memory`.
    """
    lora, config, source = lora or LoraConfig(), config or TrainConfig(), source or Source()
    base_format = BASE_FORMATS.get(config.method)
    resume = resume or ResumeConfig()
    check_folder(Path(out), resume, overwrite=overwrite)
    folder = check_output(out, overwrite=overwrite or (resume.resume != "never" and is_unfinished(Path(out))))
    ranks = ranks or single()
    ranks.barrier()  # nothing is written before all have looked
    own = folder if ranks.is_main else _folder_to_forget()
    tokenizer, shape = read_without_weights(model, source)
    with ranks.main_first() if streaming else contextlib.nullcontext():
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
    fit = fitting = None
    if memory is not None:
        if not ranks.alone:
            raise ConfigError("a budget of memory is for one process", remedy="Leave --memory out.")
        budget = parse_bytes(memory, name="memory")
        unfinished = unfinished_checkpoint(folder, resume)
        if unfinished is None:
            fitting = Fitting(shape, counted, config, lora, source)
            config, fit = fitting.choose(budget)
            source = replace(source, dtype=fit.dtype)
        else:
            config, dtype = kept_of(unfinished, config)
            source = replace(source, dtype=dtype)
    elif source.dtype == "auto":
        source = replace(source, dtype=dtype_to_load(config, source.device, sharded=ranks.shards_model))
    with MemoryMeter() as meter:
        opened = open_decoder(model, source, frozen=base_format)
        loaded_bytes = max(0, meter.growth_bytes)
        if config.method != "full":
            attach_lora(opened.decoder, lora, seed=config.seed)
        if fitting is not None and fit is not None:
            config, fit = fitting.try_out(config, fit, decoder=opened.decoder, examples=rows.examples)
            notify(describe(fit))
        predicted = predicted_training(opened.decoder, config=config, lora=lora, rows=counted)
        with ranks.main_first():
            checkpoints, found = open_checkpoints(
                folder,
                resume,
                identity=run_identity(opened, rows, config, None if config.method == "full" else lora),
                environment=run_environment(opened),
                notify=notify,
            )
        watch = TuneWatch(
            own,
            label=f"Tuning on {len(rows.examples)} rows",
            total_steps=total_steps(order_of_rows(rows.examples, config), config),
            max_seconds=config.max_seconds,
            after_step=0 if found is None else found.step,
            start_bytes=meter.start_bytes,
            progress=progress,
            tracker=tracker,
            trace=opened.decoder.device if profile else None,
        )
        with stop_on_signals(notify) as stop, watch:
            told = {"model": opened.name, "data": data, "train": config, "lora": lora}
            told |= {"input": {"base": opened.as_input()}, "version": version_record(), "hardware": hardware_record()}
            watch.begin_tracking(folder.name, to_plain(told))
            result = _train(opened, rows, config, meter, watch, checkpoints, found, stop, ranks)
            if not ranks.is_main:
                raise SystemExit(0)
            trained = sum(p.numel() for p in opened.decoder.parameters() if p.requires_grad)
            with watch.saving(folder):
                _save(opened, folder, lora, config)
    for line in watch.notes():
        notify(line)
    left = checkpoints.steps() if result.stopped == "interrupted" or resume.keep_checkpoints else []
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
        predicted_peak_bytes=sum(predicted.values()),
        predicted_components=predicted,
        component_bytes=_components(result, meter.growth_bytes, on_cpu=opened.decoder.device.type == "cpu"),
        trained_parameters=trained,
        num_examples=len(rows.examples),
        num_bad_rows=rows.num_bad_rows,
        num_too_long=rows.num_too_long,
        num_evaluated=0 if rows.evaluation is None else len(rows.evaluation),
        preflight=rows.preflight.to_dict(),
        bad_rows=rows.bad_rows,
        skipped_steps=result.skipped_steps,
        phase_seconds=watch.clock.finish(),
        trace=watch.trace_path,
        operators=watch.operators(),
        resumed_from=result.resumed_from,
        best_step=result.best_step,
        best_kept=result.best_kept,
        checkpoint=str(checkpoints.place(left[-1])) if left else None,
        fit=None if fit is None else fit.to_dict(),
    )
    figures = {name: value for name, value in asdict(record).items() if name not in ("adapter", "base", "bad_rows")}
    figures["steps"] = [{k: v for k, v in step.items() if k not in ("phases", "memory")} for step in record.steps]
    write_manifest(
        folder,
        kind="adapter" if config.method != "full" else "tuned",
        inputs={"base": opened.as_input()},
        config={
            "train": config,
            "lora": lora if config.method != "full" else None,
            "base_format": None if base_format is None else base_format.to_dict(),
        },
        data={
            **asdict(data),
            "template": rows.template,
            "eval_source": eval_data,
            "eval_split": eval_split,
            "multi_turn": rows.multi_turn,
        },
        figures=figures,
        tokenizer=opened.tokenizer,
    )
    save_run(
        folder,
        tune_run(
            asdict(record),
            parameters=opened.decoder.config.num_parameters(),
            data=data.source,
            settings={"train": to_plain(config), **({"lora": to_plain(lora)} if config.method != "full" else {})},
        ),
    )
    watch.end_tracking(record.figures(), interrupted=record.interrupted)
    if not left:
        checkpoints.clear()
    return record


def _train(
    opened: Opened,
    rows: TrainingData,
    config: TrainConfig,
    meter: MemoryMeter,
    watch: TuneWatch,
    checkpoints: CheckpointFolder,
    resume: Checkpoint | None,
    stop: StopRequest,
    ranks: Ranks,
) -> TrainResult:
    return train(
        opened.decoder,
        rows.examples,
        config=config,
        eval_examples=rows.evaluation,
        on_step=watch.on_step,
        on_evaluated=watch.on_evaluation,
        clock=watch.clock,
        meter=meter,
        checkpoints=checkpoints,
        resume=resume,
        stop=stop,
        ranks=ranks,
    )


def _components(result: TrainResult, growth: int, *, on_cpu: bool) -> dict[str, int]:
    """Memory by part at the mark that held most; on the CPU "other" is what the process's own peak was above it."""
    parts = dict(result.highest_memory or result.component_bytes)
    # They come while activations go, after the mark at which these are counted.
    parts["gradients"] = max(parts["gradients"], result.component_bytes["gradients"])
    if on_cpu:
        named = sum(size for name, size in parts.items() if name != "other")
        parts["other"] = max(0, growth - named)
    return parts


def _save(opened: Opened, folder: Path, lora: LoraConfig, config: TrainConfig) -> None:
    if config.method != "full":
        save_adapter(opened.decoder, folder, base=opened.name, config=lora)
    else:
        save_decoder(opened.decoder, folder, source=opened.folder)
