"""`quantize`: a smaller child of a model, held against its parent before anyone may use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.folder_formats import quantize_for_folder
from burnish.compress.loading import load_model
from burnish.compress.quantize import LayerError
from burnish.compress.rounded_cache import KV_DTYPES, RoundedCacheModel
from burnish.errors import BurnishError, ConfigError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.checkpoint import read_config
from burnish.models.host_memory import trim_heap
from burnish.pipeline.calibration_rows import calibration_rows, refuse_gate_rows
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import held_out
from burnish.pipeline.gates import GateOptions, GateResult, gate_error, judge, quantize_limits
from burnish.pipeline.manifest import withdraw_manifest, write_manifest
from burnish.pipeline.opening import Opened, Source, check_not_parent, check_output, data_of, open_decoder
from burnish.pipeline.predicted import predicted_quantize_peak
from burnish.pipeline.progress import Progress, silent, tell_nobody
from burnish.pipeline.qat import TRAINABLE, Qat, QatConfig, check_qat, rotated, train_quantized
from burnish.pipeline.task_gate import check_score_drop, compare_on_task
from burnish.pipeline.training_data import Row
from burnish.pipeline.unfinished_quantization import check_resume, is_unfinished, open_partial


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord:
    """What `burnish quantize --json` prints; of mixed precision `bits` are the most frequent, `widths` all."""

    out: str
    model: str
    method: str
    bits: int
    group_size: int
    seconds: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    disk_bytes: int
    bits_per_weight: float
    calibration_tokens: int
    calibration_source: str | None
    layers: list[LayerError]
    gate: GateResult
    widths: Mapping[str, int]
    qat: Qat | None = None
    format: str = "gptq"
    kv_dtype: str = "auto"


def quantize(
    model: str,
    *,
    out: str | Path,
    config: QuantizeConfig | None = None,
    mixed: MixedPrecision | None = None,
    qat: QatConfig | None = None,
    calibration: str | None = None,
    num_samples: int = 128,
    template: str = "auto",
    data: str | None = None,
    limits: GateLimits | None = None,
    gate_options: GateOptions | None = None,
    kv_dtype: str = "auto",
    source: Source | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
    notify: Callable[[str], None] = tell_nobody,
) -> QuantizeRecord:
    """Quantize a model's linears, write the folder, and compare what is read back with the parent.

    Args:
        model: folder, bundled name or hub id of a dense model.
        out: folder for the child, in the config's layout.
        config: method, bits, groups; GPTQ at 4 bits in groups of 128 when None.
        mixed: choose each linear's bits by what its rounding costs, within a budget.
        qat: then train the integers and scales, with the rounding in every forward (`rtn` and `gptq`).
        calibration: rows to calibrate on and to train with; by default the training rows that the model's manifest
            names, else the bundled task's training rows. Never evaluation rows.
        num_samples: calibration examples.
        template: how calibration rows are rendered, where the manifest does not say.
        data: held-out rows for the gate; defaults as in `merge`.
        limits: what the child may lose; by bits when None, with mixed precision by their average.
        gate_options: how many answers the gate compares, and limits in the place of those.
        kv_dtype: "int8" holds the child against its parent as it will be with a KV cache of 8 bits.
        resume: "auto" goes on with the unfinished quantization that `out` holds, if it holds one; "never" begins anew.
        notify: told what is gone on from.

    Raises:
        ConfigError, CheckpointError, DataError: bad input.
        CompressionError: weights that cannot be quantized.
        GateError: the child is worse than the limits allow; its manifest says so and names the worst layers.
    """
    config, source = config or QuantizeConfig(), source or Source()
    gate_options = gate_options or GateOptions()
    if num_samples < 1:
        raise ConfigError("samples is out of range", got=num_samples, expected="1 or more")
    if kv_dtype not in KV_DTYPES:
        raise ConfigError("kv_dtype is not known", got=repr(kv_dtype), expected=" or ".join(KV_DTYPES))
    check_resume(resume)
    if qat is not None:
        check_qat(config)
        qat = qat.started_from(config)
    folder = check_output(out, overwrite=overwrite or (resume == "auto" and is_unfinished(Path(out))))
    with MemoryMeter() as meter:
        parent = open_decoder(model, source)
        if parent.adapter is not None:
            raise ConfigError(f"{model} is an adapter", remedy="Merge it first: burnish merge ADAPTER --out DIR")
        check_not_parent(folder, parent)
        if read_config(parent.folder).get("quantization_config") is not None:
            raise ConfigError(f"{model} is quantized already", remedy="Start from its dense parent.")
        longest = parent.decoder.config.max_position_embeddings
        recorded = data_of(parent)
        rows, calibration_source = _rows(parent, config, mixed, qat, calibration, num_samples, template)
        calibrates = mixed is not None or config.needs_calibration
        tokens = [list(row.tokens) for row in rows[:num_samples]] if calibrates else None
        gate_examples = held_out(parent.tokenizer, data=data, recorded=recorded, longest=longest)
        refuse_gate_rows(calibration_source, data=data, recorded=recorded)
        check_score_drop(gate_options, data=data, recorded=recorded)
        partial = open_partial(folder, parent, config, mixed, tokens, resume=resume, notify=notify)
        predicted = predicted_quantize_peak(parent.decoder, config=config, num_tokens=sum(map(len, tokens or ())))
        child = load_model(
            parent.folder, dtype=parent.decoder.dtype, device=source.device, allow_pickle=source.allow_pickle
        )
        total = len(_linears(child))
        done: list[str] = []

        def on_layer(name: str, error: float, seconds: float) -> None:
            done.append(name)
            progress(
                f"Quantizing to {config.bits if mixed is None else 'mixed'} bits",
                len(done),
                total,
                f"{name.removeprefix('model.layers.')} {error:.4f}",
            )

        def on_unit(count: int, units: int) -> None:
            progress("Measuring what each layer costs", count, units)

        try:
            result, save = quantize_for_folder(
                child, tokens, config, mixed=mixed, on_layer=on_layer, on_unit=on_unit, partial=partial
            )
        except BurnishError:
            if not partial.finished:  # nothing to go on from
                partial.clear()
            raise
        trained = None
        if qat is not None:
            dense = rotated(parent, source) if config.rotate else parent.decoder
            trained = train_quantized(child, dense, rows, qat, partial=partial, progress=progress, notify=notify)
        save(folder, parent.folder)
        withdraw_manifest(folder)
        del child, save
        trim_heap()
        stored = load_model(folder, dtype=parent.decoder.dtype, device=source.device)
        compared = stored if kv_dtype == "auto" else RoundedCacheModel(stored)
        comparison = compare_models(compared, parent.decoder, gate_examples.examples)
    task = compare_on_task(
        stored,
        parent.decoder,
        parent.tokenizer,
        data=data,
        recorded=recorded,
        num_rows=gate_options.rows,
        kv_dtype=kv_dtype,
        progress=progress,
    )
    partial.clear()  # until here a run that was ended goes on from it
    limits = limits or quantize_limits(result.bits_per_weight if result.widths else result.config.bits)
    gate = judge(comparison, gate_options.applied(limits), layers=result.layers, task=task)
    record = QuantizeRecord(
        out=str(folder),
        model=model,
        method=config.method,
        bits=result.config.bits,
        group_size=config.group_size,
        seconds=meter.reading().seconds,
        peak_memory_bytes=meter.growth_bytes,
        predicted_peak_bytes=predicted,
        disk_bytes=folder_bytes(folder),
        bits_per_weight=result.bits_per_weight,
        calibration_tokens=result.calibration_tokens,
        calibration_source=calibration_source,
        layers=list(result.layers),
        gate=gate,
        widths=result.widths,
        qat=trained,
        format=config.layout,
        kv_dtype=kv_dtype,
    )
    write_manifest(
        folder,
        kind="quantized",
        inputs={"model": parent.as_input()},
        config=to_plain(result.config)
        | ({} if mixed is None else {"mixed_precision": to_plain(mixed)})
        | ({} if qat is None else {"qat": to_plain(qat)}),
        data=recorded,
        figures=to_plain(record),
        gate=to_plain(gate),
        tokenizer=parent.tokenizer,
    )
    if not gate.passed:
        width = f"{config.bits}-bit" if mixed is None else "mixed-precision"
        raise gate_error(f"the {width} model {folder}", gate, remedy=_remedy(config, mixed, qat, result.layers))
    return record


def _rows(
    parent: Opened,
    config: QuantizeConfig,
    mixed: MixedPrecision | None,
    qat: QatConfig | None,
    calibration: str | None,
    num_samples: int,
    template: str,
) -> tuple[Sequence[Row], str | None]:
    """Examples to calibrate on and to train with, and where they come from; none where none are needed."""
    if not config.needs_calibration and mixed is None and qat is None:
        if calibration is not None:
            raise ConfigError(
                f"{config.method} takes no calibration data", got=calibration, remedy="Use --method gptq."
            )
        return [], None
    limit = max(num_samples, 0 if qat is None else qat.num_rows)
    return calibration_rows(parent, calibration, template=template, limit=limit)


def _linears(decoder: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    ]


def _remedy(
    config: QuantizeConfig, mixed: MixedPrecision | None, qat: QatConfig | None, layers: Sequence[LayerError]
) -> str:
    """What to try, with the layers that lost most where more bits would help most."""
    worst = sorted(layers, key=lambda layer: -layer.error)[:3]
    names = ", ".join(layer.name.removeprefix("model.") for layer in worst)
    if mixed is not None:
        advice = ["a larger --max-size" if mixed.target_bits is None else "more --target-bits"]
    elif config.method not in ("rtn", "gptq", "awq", "awq-gptq"):
        return f"Worst are {names}. Try --method gptq --bits 8, or --method gptq --target-bits 5 to spend bits there."
    elif config.bits < 8:
        advice = ["more --bits", f"--target-bits {config.bits + 1} to spend them where they are missed ({names})"]
    else:
        advice = []
    advice.append("a smaller --group-size")
    if config.method == "rtn":
        advice.insert(0, "--method gptq")
    else:
        advice.append("more --samples")
        if config.corrects and not config.activation_order and (config.layout == "gptq" or config.group_size == -1):
            advice.append("--act-order")
    if config.corrects and config.true_sequential and not config.match_parent:
        advice.append("--match-parent --refine 3")
    if config.method in TRAINABLE:
        advice.append("--qat 200" if qat is None else "more steps of --qat")
    return f"Try {', '.join(advice)}."
