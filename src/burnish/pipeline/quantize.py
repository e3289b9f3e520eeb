"""`quantize`: a smaller child of a model, held against its parent before anyone may use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import LayerError, QuantizeResult, quantize_model
from burnish.errors import BurnishError, ConfigError, DataError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.checkpoint import read_config
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import DataConfig, held_out, prepare
from burnish.pipeline.gates import QUANTIZE_LIMITS, GateResult, gate_error, judge
from burnish.pipeline.manifest import write_manifest
from burnish.pipeline.opening import Opened, Source, check_output, data_of, open_decoder
from burnish.pipeline.predicted import predicted_quantize_peak
from burnish.pipeline.progress import Progress, silent, tell_nobody
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


def quantize(
    model: str,
    *,
    out: str | Path,
    config: QuantizeConfig | None = None,
    mixed: MixedPrecision | None = None,
    calibration: str | None = None,
    num_samples: int = 128,
    template: str = "auto",
    data: str | None = None,
    limits: GateLimits | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    source: Source | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
    notify: Callable[[str], None] = tell_nobody,
) -> QuantizeRecord:
    """Quantize a model's linears, write the folder, and compare what is read back with the parent.

    Args:
        model: folder, bundled name or hub id of a dense model.
        out: folder for the child, in the common GPTQ layout.
        config: method, bits, groups; GPTQ at 4 bits in groups of 128 when None.
        mixed: choose each linear's bits by what its rounding costs, within a budget.
        calibration: rows to calibrate on; by default the training rows that the model's manifest names, else the
            bundled task's training rows. Never evaluation rows.
        num_samples: calibration examples.
        template: how calibration rows are rendered, where the manifest does not say.
        data: held-out rows for the gate; defaults as in `merge`.
        limits: what the child may lose; by bits when None, with mixed precision by their average.
        max_kl, min_agreement: take the place of the limits' own.
        resume: "auto" goes on with the unfinished quantization that `out` holds, if it holds one; "never" begins anew.
        notify: told what is gone on from.

    Raises:
        ConfigError, CheckpointError, DataError: bad input.
        CompressionError: weights that cannot be quantized.
        GateError: the child is worse than the limits allow; its manifest says so and names the worst layers.
    """
    config, source = config or QuantizeConfig(), source or Source()
    if num_samples < 1:
        raise ConfigError("samples is out of range", got=num_samples, expected="1 or more")
    check_resume(resume)
    folder = check_output(out, overwrite=overwrite or (resume == "auto" and is_unfinished(Path(out))))
    with MemoryMeter() as meter:
        parent = open_decoder(model, source)
        if parent.adapter is not None:
            raise ConfigError(f"{model} is an adapter", remedy="Merge it first: burnish merge ADAPTER --out DIR")
        if "quantization_config" in read_config(parent.folder):
            raise ConfigError(f"{model} is quantized already", remedy="Start from its dense parent.")
        longest = parent.decoder.config.max_position_embeddings
        recorded = data_of(parent)
        tokens, calibration_source = _calibration(parent, config, mixed, calibration, num_samples, template)
        gate_examples = held_out(parent.tokenizer, data=data, recorded=recorded, longest=longest)
        if calibration_source is not None and data == calibration_source:
            raise DataError(
                "the gate's rows are the calibration rows", got=data, remedy="Give held-out rows with --gate-data."
            )
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
            result = quantize_model(
                child, tokens, config, mixed=mixed, on_layer=on_layer, on_unit=on_unit, partial=partial
            )
        except BurnishError:
            if not partial.finished:  # nothing to go on from
                partial.clear()
            raise
        save_quantized(child, folder, source=parent.folder, config=result.config, widths=result.widths)
        limits = _limits(limits, result, max_kl, min_agreement)
        del child
        stored = load_model(folder, dtype=parent.decoder.dtype, device=source.device)
        gate = judge(compare_models(stored, parent.decoder, gate_examples.examples), limits, layers=result.layers)
    partial.clear()
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
    )
    write_manifest(
        folder,
        kind="quantized",
        inputs={"model": parent.as_input()},
        config=to_plain(result.config) | ({} if mixed is None else {"mixed_precision": to_plain(mixed)}),
        data=recorded,
        figures=to_plain(record),
        gate=to_plain(gate),
        tokenizer=parent.tokenizer,
    )
    if not gate.passed:
        width = f"{config.bits}-bit" if mixed is None else "mixed-precision"
        raise gate_error(f"the {width} model {folder}", gate, remedy=_remedy(config, mixed))
    return record


def _limits(
    limits: GateLimits | None, result: QuantizeResult, max_kl: float | None, min_agreement: float | None
) -> GateLimits:
    """The limits that were given, or those of the widest width that the child is on average."""
    if limits is None:
        bits = result.bits_per_weight if result.widths else result.config.bits
        limits = QUANTIZE_LIMITS[max((width for width in QUANTIZE_LIMITS if width <= bits), default=2)]
    return replace(
        limits,
        max_kl_mean=limits.max_kl_mean if max_kl is None else max_kl,
        min_greedy_agreement=limits.min_greedy_agreement if min_agreement is None else min_agreement,
    )


def _calibration(
    parent: Opened,
    config: QuantizeConfig,
    mixed: MixedPrecision | None,
    calibration: str | None,
    num_samples: int,
    template: str,
) -> tuple[list[list[int]] | None, str | None]:
    """Token sequences to calibrate on and where they come from; None for a method that needs none."""
    if config.method == "rtn" and mixed is None:
        if calibration is not None:
            raise ConfigError("rtn takes no calibration data", got=calibration, remedy="Use --method gptq.")
        return None, None
    recorded = data_of(parent) or {}
    chosen = calibration or recorded.get("source") or "text-to-sql:train"
    columns = recorded.get("columns") if chosen == recorded.get("source") else None
    rows = DataConfig(
        source=str(chosen),
        template=str(recorded.get("template") or template),
        columns=columns if isinstance(columns, dict) else None,
        limit=num_samples,
    )
    prepared = prepare(rows, parent.tokenizer, longest=parent.decoder.config.max_position_embeddings)
    return [list(example.tokens) for example in prepared.examples.examples], str(chosen)


def _linears(decoder: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    ]


def _remedy(config: QuantizeConfig, mixed: MixedPrecision | None) -> str:
    more = "more --bits"
    if mixed is not None:
        more = "a larger --max-size" if mixed.target_bits is None else "more --target-bits"
    advice = [more, "a smaller --group-size"]
    if config.method == "rtn":
        advice.insert(0, "--method gptq")
    elif not config.activation_order:
        advice.append("--act-order")
    if config.corrects and not config.match_parent:
        advice.append("--match-parent --refine 3")
    return f"Try {', '.join(advice)}."
