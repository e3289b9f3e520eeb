"""`prune`: a child with zeros in its weights, or with fewer weights, held against its parent before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from burnish.compress.calibration import block_linears
from burnish.compress.loading import load_model
from burnish.compress.prune_config import PruneConfig
from burnish.compress.pruning import PrunedLayer, PruneResult, prune_model
from burnish.compress.structured import prune_structured
from burnish.errors import ConfigError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.checkpoint import read_config
from burnish.models.decoder import Decoder
from burnish.models.loading import parse_dtype, save_decoder
from burnish.pipeline.calibration_rows import calibration_rows, refuse_gate_rows
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import held_out
from burnish.pipeline.gates import PRUNE_LIMITS, GateOptions, GateResult, gate_error, judge
from burnish.pipeline.manifest import withdraw_manifest, write_manifest
from burnish.pipeline.opening import Opened, Source, check_not_parent, check_output, data_of, open_decoder
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.recovery import RecoverConfig, Recovery
from burnish.pipeline.recovery import recover as learn_again
from burnish.pipeline.task_gate import check_score_drop, compare_on_task
from burnish.pipeline.training_data import Row

ZEROS_COST = (
    "zeros are stored and multiplied like any other number: this child is neither smaller nor faster here than its "
    "parent, on the CPU or on a card"
)
SMALLER = "what was removed is gone: the child is a dense model of a smaller shape, in memory and in time"


@dataclass(frozen=True, kw_only=True)
class PruneRecord:
    """What `burnish prune --json` prints.

    `sparsity` is the share of the blocks' weights that are zero, or were removed; `speed` says what that is worth.
    """

    out: str
    model: str
    method: str
    amount: str
    speed: str
    sparsity: float
    dense_columns: int
    parameters: int
    parent_parameters: int
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    calibration_tokens: int
    calibration_source: str | None
    layers: list[PrunedLayer]
    recovery: Recovery | None
    gate: GateResult


def prune(
    model: str,
    *,
    out: str | Path,
    config: PruneConfig | None = None,
    recover: RecoverConfig | None = None,
    calibration: str | None = None,
    num_samples: int = 128,
    template: str = "auto",
    data: str | None = None,
    limits: GateLimits | None = None,
    gate_options: GateOptions | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> PruneRecord:
    """Prune a model, let it recover if asked to, write the folder, and compare what is read back with the parent.

    Args:
        model: folder, bundled name or hub id of a dense model.
        out: folder for the child: dense safetensors with the zeros stored, or a smaller dense model.
        config: method and amount; SparseGPT at 50 % when None.
        recover: train adapters on the pruned model and merge them, its zeros kept.
        calibration: rows to calibrate on and to recover with; by default the training rows that the model's manifest
            names, else the bundled task's training rows. Never evaluation rows.
        num_samples: calibration examples.
        template: how those rows are rendered, where the manifest does not say.
        data: held-out rows for the gate; defaults as in `merge`.
        limits: what the child may lose; `PRUNE_LIMITS` of the method, or of a recovered child, when None.
        gate_options: how many answers the gate compares, and limits in the place of those.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, or a smaller shape that no config.json says.
        CompressionError: weights that cannot be pruned.
        GateError: the child is worse than the limits allow; its manifest says so and names the worst layers.
    """
    config, source = config or PruneConfig(), source or Source()
    gate_options = gate_options or GateOptions()
    limits = limits or PRUNE_LIMITS[config.method if recover is None else "recovered"]
    if num_samples < 1:
        raise ConfigError("samples is out of range", got=num_samples, expected="1 or more")
    if calibration is not None and not config.needs_calibration and recover is None:
        raise ConfigError("magnitude takes no calibration data", got=calibration, remedy="Use wanda or sparsegpt.")
    folder = check_output(out, overwrite=overwrite)
    with MemoryMeter() as meter:
        parent = open_decoder(model, source)
        if parent.adapter is not None:
            raise ConfigError(f"{model} is an adapter", remedy="Merge it first: burnish merge ADAPTER --out DIR")
        check_not_parent(folder, parent)
        if read_config(parent.folder).get("quantization_config") is not None:
            raise ConfigError(f"{model} is quantized", remedy="Prune its dense parent.")
        recorded = data_of(parent)
        rows, rows_source = _rows(parent, config, recover, calibration, num_samples, template)
        longest = parent.decoder.config.max_position_embeddings
        gate_examples = held_out(parent.tokenizer, data=data, recorded=recorded, longest=longest)
        refuse_gate_rows(rows_source, data=data, recorded=recorded)
        check_score_drop(gate_options, data=data, recorded=recorded)
        child = load_model(
            parent.folder, dtype=parent.decoder.dtype, device=source.device, allow_pickle=source.allow_pickle
        )
        tokens = [list(row.tokens) for row in rows[:num_samples]] if config.needs_calibration else None
        child, result = _pruned(child, tokens, config, progress)
        recovery = None
        if recover is not None:
            masked = not config.is_structured
            recovery = learn_again(child, rows, recover, masked=masked, progress=progress)
        sparsity = result.sparsity if config.is_structured else _zeros(child)
        save_decoder(child, folder, source=parent.folder, dtype=parse_dtype("auto", read_config(parent.folder)))
        withdraw_manifest(folder)
        parameters = child.config.num_parameters()
        del child
        stored = load_model(folder, dtype=parent.decoder.dtype, device=source.device)
        comparison = compare_models(stored, parent.decoder, gate_examples.examples)
    task = compare_on_task(
        stored,
        parent.decoder,
        parent.tokenizer,
        data=data,
        recorded=recorded,
        num_rows=gate_options.rows,
        progress=progress,
    )
    gate = judge(comparison, gate_options.applied(limits), layers=result.layers, task=task)
    record = PruneRecord(
        out=str(folder),
        model=model,
        method=config.method,
        amount=config.described,
        speed=SMALLER if config.is_structured else ZEROS_COST,
        sparsity=sparsity,
        dense_columns=result.dense_columns,
        parameters=parameters,
        parent_parameters=parent.decoder.config.num_parameters(),
        seconds=meter.reading().seconds,
        peak_memory_bytes=meter.growth_bytes,
        disk_bytes=folder_bytes(folder),
        calibration_tokens=result.calibration_tokens,
        calibration_source=rows_source,
        layers=list(result.layers),
        recovery=recovery,
        gate=gate,
    )
    write_manifest(
        folder,
        kind="pruned",
        inputs={"model": parent.as_input()},
        config={**to_plain(config), "recover": to_plain(recover)},
        data=recorded,
        figures=to_plain(record),
        gate=to_plain(gate),
        tokenizer=parent.tokenizer,
    )
    if not gate.passed:
        raise gate_error(f"the pruned model {folder}", gate, remedy=_remedy(config, recover))
    return record


def _rows(
    parent: Opened,
    config: PruneConfig,
    recover: RecoverConfig | None,
    calibration: str | None,
    num_samples: int,
    template: str,
) -> tuple[Sequence[Row], str | None]:
    """Examples to calibrate on and to recover with, and where they come from; none for a method that needs none."""
    if not config.needs_calibration and recover is None:
        return [], None
    limit = max(num_samples, 0 if recover is None else recover.num_rows)
    return calibration_rows(parent, calibration, template=template, limit=limit)


def _pruned(
    child: Decoder, tokens: list[list[int]] | None, config: PruneConfig, progress: Progress
) -> tuple[Decoder, PruneResult]:
    total = sum(len(block_linears(block)) for block in child.model.layers)
    if config.is_structured:
        total = config.layers + (bool(config.heads) + bool(config.channels)) * (len(child.model.layers) - config.layers)
    done: list[str] = []

    def on_layer(layer: PrunedLayer) -> None:
        done.append(layer.name)
        progress(
            f"Pruning ({config.method})",
            len(done),
            total,
            f"{layer.name.removeprefix('model.layers.')} {layer.error:.4f}",
        )

    if config.is_structured:
        assert tokens is not None
        return prune_structured(child, tokens, config, on_layer=on_layer)
    return child, prune_model(child, tokens, config, on_layer=on_layer)


def _zeros(decoder: Decoder) -> float:
    """Share of the blocks' weights that are zero."""
    linears: list[nn.Linear] = [linear for block in decoder.model.layers for linear in block_linears(block).values()]
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    return zeros / sum(linear.weight.numel() for linear in linears)


def _remedy(config: PruneConfig, recover: RecoverConfig | None) -> str:
    advice = ["remove less"] if config.is_structured else ["a smaller --sparsity"]
    if config.method in ("magnitude", "wanda"):
        advice.insert(0, "--method sparsegpt")
    if config.needs_calibration:
        advice.append("more --samples")
    advice.append("--recover 200" if recover is None else "more steps of --recover")
    return f"Try {', '.join(advice)}."
