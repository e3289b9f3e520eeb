"""One variant of a run, measured: how often it is right, how fast it is, what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from burnish.data.rows import RowSet
from burnish.measure.bench import Workload, run_bench
from burnish.measure.evaluate import SqlScore
from burnish.measure.memory import MemoryMeter, dtype_table
from burnish.measure.run_record import DtypeShare, Stage, Variant
from burnish.pipeline.bench import quantization_of
from burnish.pipeline.disk import weight_file_bytes
from burnish.pipeline.evaluate import score_rows, template_for
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source, engine_of, open_decoder
from burnish.pipeline.predicted import predicted_inference_peak
from burnish.pipeline.progress import Progress, silent

SPEED = {
    1: Workload(input_tokens=128, output_tokens=32, concurrency=1),
    8: Workload(input_tokens=128, output_tokens=32, concurrency=8),
}
MAX_NUM_SEQS = 32
MAX_ANSWER = 96
MAX_MODEL_LEN = 320


@dataclass(frozen=True, kw_only=True)
class MeasuredVariant:
    """A variant without its place in the family: parent, gate and verdict are the caller's to add."""

    variant: Variant
    stage: Stage
    score: SqlScore


def measure_variant(
    name: str, model: str, source: Source, rows: RowSet, *, repeats: int = 3, progress: Progress = silent
) -> MeasuredVariant:
    """Load a model, let it answer the rows, and time it alone and eight at once.

    Memory is what the process grew by over the state before the model was loaded, at its worst moment.
    """

    def watch(label: str, done: int, total: int, note: str = "") -> None:
        progress(f"{name}: {label.lower()}", done, total, note)

    with MemoryMeter() as meter:
        opened = open_decoder(model, source)
        dtypes = [
            DtypeShare(dtype=row.dtype, elements=row.elements, bytes=row.bytes, share=row.share)
            for row in dtype_table(opened.decoder)
        ]
        engine = engine_of(
            opened, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, optimise=opened.adapter is None
        )
        engine.warm_up()
        template = template_for(opened, DataConfig(source=rows.source), rows)
        score = score_rows(engine, rows.rows, opened.tokenizer, template, max_tokens=MAX_ANSWER, progress=watch)
        assert isinstance(score, SqlScore)
        speed = {
            concurrency: run_bench(
                engine, workload, model=name, repeats=repeats, vocab_size=opened.decoder.config.vocab_size
            )
            for concurrency, workload in SPEED.items()
        }
    stats = engine.stats()
    folder = opened.folder if opened.adapter is None else opened.adapter
    disk = weight_file_bytes(folder) + (0 if opened.adapter is None else weight_file_bytes(opened.folder))
    variant = Variant(
        name=name,
        path=str(Path(model).name),
        dtype=stats.dtype,
        disk_bytes=disk,
        weights_bytes=stats.weights_bytes,
        kv_bytes=stats.kv_bytes,
        peak_memory_bytes=meter.growth_bytes,
        ttft_ms=speed[1].ttft_ms["p50"],
        tpot_ms=speed[1].tpot_ms["p50"],
        output_tokens_per_s_1=speed[1].output_tokens_per_s,
        output_tokens_per_s_8=speed[8].output_tokens_per_s,
        score=score.score,
        score_low=score.score_low,
        score_high=score.score_high,
        num_rows=score.num_rows,
        dtypes=dtypes,
    )
    stage = Stage(
        name=f"evaluate {name}",
        seconds=meter.reading().seconds,
        predicted_peak_bytes=predicted_inference_peak(
            opened.decoder,
            weight_format=_weight_format(quantization_of(model, source)),
            concurrency=MAX_NUM_SEQS,
            input_tokens=MAX_MODEL_LEN - MAX_ANSWER,
            output_tokens=MAX_ANSWER,
        ),
        measured_peak_bytes=meter.growth_bytes,
        components={"weights": stats.weights_bytes, "kv": stats.kv_bytes},
    )
    return MeasuredVariant(variant=variant, stage=stage, score=score)


def _weight_format(quantization: str | None) -> str | None:
    """What a folder's linears are in memory: of groups any width is held as int8; bitsandbytes' become dense."""
    if quantization is None or quantization.startswith("bitsandbytes"):
        return None
    return "w8a8" if quantization.endswith("w8a8") else "int8"
