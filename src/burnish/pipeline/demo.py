"""The whole story on the bundled model and task: tune, merge, quantize, and every variant measured side by side."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from burnish.compress.config import QuantizeConfig
from burnish.data.bundled import bundled_path
from burnish.data.rows import RowSet, read_rows
from burnish.errors import GateError
from burnish.measure.compare import Gate, GateLimits
from burnish.measure.evaluate import SqlScore
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.json_values import to_plain
from burnish.measure.report import render
from burnish.measure.run_record import RunRecord, Stage, Variant
from burnish.models.atomic_files import write_text
from burnish.models.loading import load_config
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.gates import GateResult
from burnish.pipeline.merge import merge
from burnish.pipeline.opening import Source, engine_of, open_decoder
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.quantize import quantize
from burnish.pipeline.runs import RUN_NAME, new_run_folder, save_run
from burnish.pipeline.samples import pick_samples
from burnish.pipeline.tracked import TrackedStage, tracked, tracked_to
from burnish.pipeline.training_record import eval_points, loss_points, training_points, tune_stage
from burnish.pipeline.tune import TuneRecord, tune
from burnish.pipeline.variants import measure_variant
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig

MODEL = "burnish-sql-base"
TRAIN_ROWS = "text-to-sql:train:6400"
EVAL_ROWS = "text-to-sql:validation:64"
TEST_ROWS = "text-to-sql:test"
LORA = LoraConfig(rank=32, alpha=64)
TRAIN = TrainConfig(epochs=1, micro_batch_size=16, learning_rate=1.5e-3, warmup=0.05, schedule="cosine", eval_every=80)
QUANTIZED = {
    "gptq-8bit": QuantizeConfig(method="gptq", bits=8, group_size=128),
    "gptq-4bit": QuantizeConfig(method="gptq", bits=4, group_size=64),
}
MAX_SCORE_DROP = {"gptq-8bit": 0.01, "gptq-4bit": 0.04}

Say = Callable[[str], None]


@dataclass
class _Story:
    """The run as it grows; saved after every stage, so that what was done stays on record when a later one fails."""

    folder: Path
    run: RunRecord
    started: float
    source: Source
    rows: RowSet
    progress: Progress
    say: Say
    tracked: TrackedStage
    scores: dict[str, SqlScore] = field(default_factory=dict)

    def add(self, *, stage: Stage | None = None, variant: Variant | None = None, **changes: Any) -> None:
        stages = [*self.run.stages, *([stage] if stage else [])]
        variants = [*self.run.variants, *([variant] if variant else [])]
        seconds = time.perf_counter() - self.started
        self.run = replace(self.run, stages=stages, variants=variants, seconds=seconds, **changes)
        save_run(self.folder, self.run)
        for item in (stage, variant):
            if item is not None:
                self.tracked.figures({item.name: _figures_of(item)})

    @contextmanager
    def stage(self, name: str, *, folder: Path | None = None) -> Iterator[TrackedStage]:
        """A stage with its own run within the demo's; one that fails is put on record before its error goes on."""
        begun = time.perf_counter()
        try:
            with tracked(self.tracked.tracker.child(name.replace(" ", "-")), name, folder=folder) as told:
                yield told
        except BaseException as error:
            self.failed(name, begun, error)
            raise

    def failed(self, name: str, begun: float, error: BaseException) -> None:
        """Put a failed stage on record."""
        note = " ".join(str(error).split()) or type(error).__name__
        self.add(stage=Stage(name=name, seconds=time.perf_counter() - begun, status="failed", note=note))


def run_demo(
    *,
    out: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    max_seconds: float | None = None,
    num_rows: int = 300,
    track: str | None = None,
    progress: Progress = silent,
    say: Say = lambda text: None,
    warn: Say | None = None,
) -> tuple[Path, RunRecord]:
    """Run everything; returns the run's folder and its record. The same seed gives the same scores.

    Args:
        out: the run's folder; a fresh one among the runs when None.
        max_seconds: stop tuning after this time instead of after one epoch.
        num_rows: test questions.
        track: URI of a tracker, as `make_tracker` takes it: one run, with a run within it for each stage.
        say: called with a line whenever a stage is done.
        warn: called with a line where tracking failed; `say` if None.

    Raises:
        GateError: the merged or a quantized model is not what its parent was; the run so far is on record. A variant
            that only answers worse is left to `require_passed`.
    """
    source = Source(threads=threads)
    config = replace(TRAIN, seed=seed, max_seconds=max_seconds)
    rows = read_rows(f"{TEST_ROWS}:{num_rows}", seed=seed)
    folder, run = new_run_folder("demo", out=out), _fresh_run(seed)
    settings = {"model": MODEL, **run.settings}
    with tracked_to(track, folder.name, settings, folder=folder, say=say, warn=warn) as told:
        story = _Story(
            folder=folder,
            run=run,
            started=time.perf_counter(),
            source=source,
            rows=rows,
            progress=progress,
            say=say,
            tracked=told,
        )
        _first_use(source)
        try:
            _tell(story, config)
        finally:
            write_text(folder / "report.html", render(story.run, format="html"))
            for name in ("report.html", RUN_NAME):
                if (folder / name).is_file():
                    told.tracker.artifact(folder / name)
    return folder, story.run


def require_passed(folder: Path, run: RunRecord) -> None:
    """Refuse a run with a variant that failed its gate.

    Raises:
        GateError: naming the variants and why.
    """
    failed = [variant for variant in run.variants if variant.verdict == "fail"]
    if failed:
        reasons = "; ".join(f"{variant.name}: {', '.join(variant.reasons)}" for variant in failed)
        raise GateError(f"the demo's gates failed: {reasons}", remedy=f"See {folder / 'report.html'}")


def _first_use(source: Source) -> None:
    """Run the base for a moment, so that what a process pays once does not land on the variant measured first."""
    engine_of(open_decoder(MODEL, source), max_num_seqs=1, max_model_len=64).warm_up()


def _tell(story: _Story, config: TrainConfig) -> None:
    source, progress = story.source, story.progress
    same = GateLimits(max_score_drop=0.0)
    _measure(story, "base", MODEL, description="bundled base, never trained on the task")

    adapter = _tune(story, config).adapter
    _measure(story, "tuned", adapter, parent="base", description=f"LoRA rank {LORA.rank}, unmerged", limits=same)

    with story.stage("merge", folder=story.folder / "merged") as told:
        merged = merge(adapter, out=story.folder / "merged", source=source, dtype="float32", progress=progress)
        told.made(merged.out)
    story.add(stage=_stage("merge", merged.seconds, merged.predicted_peak_bytes, merged.peak_memory_bytes))
    in_float32 = "adapter merged into the base, in float32"
    _measure(story, "merged", merged.out, parent="tuned", description=in_float32, gate=merged.gate, limits=same)

    for name, config_of in QUANTIZED.items():
        with story.stage(f"quantize {name}", folder=story.folder / name) as told:
            made = quantize(merged.out, out=story.folder / name, config=config_of, source=source, progress=progress)
            told.made(made.out)
        story.add(stage=_stage(f"quantize {name}", made.seconds, made.predicted_peak_bytes, made.peak_memory_bytes))
        grid = f"GPTQ {config_of.bits} bits, groups of {config_of.group_size}"
        limits = GateLimits(max_score_drop=MAX_SCORE_DROP[name])
        _measure(story, name, made.out, parent="merged", description=grid, gate=made.gate, limits=limits)
    story.add(samples=pick_samples(story.scores))


def _fresh_run(seed: int) -> RunRecord:
    config = load_config(bundled_path(MODEL))
    hardware = {**hardware_record(), "threads": torch.get_num_threads(), "device": "cpu"}
    return RunRecord(
        name="demo",
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        model=MODEL,
        parameters=config.num_parameters(),
        task="text-to-sql",
        data=f"{TRAIN_ROWS}, {TEST_ROWS}",
        hardware=hardware,
        versions={**version_record(), "python": platform.python_version()},
        settings={
            "seed": {"seed": seed},
            "lora": to_plain(LORA),
            "train": to_plain(TRAIN),
            **{name: to_plain(item) for name, item in QUANTIZED.items()},
        },
    )


def _tune(story: _Story, config: TrainConfig) -> TuneRecord:
    begun = time.perf_counter()
    try:
        record = _tuned(story, config)
    except BaseException as error:
        story.failed("tune", begun, error)
        raise
    if record.interrupted:
        raise KeyboardInterrupt
    story.say(f"tuned in {record.seconds:.0f} s: {len(record.steps)} steps, {record.tokens_per_s:,.0f} tokens/s")
    story.add(
        stage=tune_stage(asdict(record)),
        loss=loss_points(record.steps),
        eval_loss=eval_points(record.evals),
        training=training_points(record.steps),
    )
    return record


def _tuned(story: _Story, config: TrainConfig) -> TuneRecord:
    return tune(
        MODEL,
        data=DataConfig(source=TRAIN_ROWS, template="chat", max_length=256, seed=config.seed),
        out=story.folder / "adapter",
        lora=LORA,
        config=config,
        eval_data=EVAL_ROWS,
        source=story.source,
        tracker=story.tracked.tracker.child("tune"),
        progress=story.progress,
    )


def _figures_of(item: Stage | Variant) -> dict[str, Any]:
    """What the demo's own run has of a stage or a variant; the whole is in run.json."""
    plain = to_plain(item)
    return {name: value for name, value in plain.items() if isinstance(value, int | float)} | {
        name: value for name, value in plain.items() if name in ("status", "verdict")
    }


def _stage(name: str, seconds: float, predicted: int | None, measured: int) -> Stage:
    return Stage(name=name, seconds=seconds, predicted_peak_bytes=predicted, measured_peak_bytes=measured)


def _measure(
    story: _Story,
    name: str,
    model: str,
    *,
    description: str,
    parent: str | None = None,
    gate: GateResult | None = None,
    limits: GateLimits | None = None,
) -> None:
    """Score and time one variant, and hold it against its parent."""
    with story.stage(f"evaluate {name}") as told:
        measured = measure_variant(name, model, story.source, story.rows, progress=story.progress)
        told.record(measured.variant)
    story.scores[name] = measured.score
    reasons = list(gate.reasons) if gate else []
    if limits is not None and parent is not None:
        reasons += Gate(limits).judge(score=measured.score.score, parent_score=story.scores[parent].score).reasons
    variant = replace(
        measured.variant,
        parent=parent,
        description=description,
        kl_to_parent=gate.kl_mean if gate else None,
        kl_p99=gate.kl_p99 if gate else None,
        greedy_agreement=gate.greedy_agreement if gate else None,
        verdict=None if parent is None else "fail" if reasons else "pass",
        reasons=reasons,
    )
    story.add(stage=measured.stage, variant=variant)
    story.say(f"{name}: {measured.score.num_right} of {measured.score.num_rows} right ({measured.score.score:.1%})")
