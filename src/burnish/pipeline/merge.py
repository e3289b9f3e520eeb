"""`merge`: adapters become part of their base's weights, and the result has to be what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from burnish.compress.frozen_loading import FrozenFormat, dequantize_in_place
from burnish.compress.loading import load_model
from burnish.errors import ConfigError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.adapter_files import is_adapter_folder, read_adapter_config, read_base_format
from burnish.models.checkpoint import read_config
from burnish.models.decoder import Decoder
from burnish.models.loading import parse_dtype, save_decoder
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import held_out
from burnish.pipeline.gates import MERGE_LIMITS, GateOptions, GateResult, gate_error, judge
from burnish.pipeline.manifest import describe_input, withdraw_manifest, write_manifest
from burnish.pipeline.merge_choice import ONTO, MergeTrial, better, trial_of
from burnish.pipeline.opening import (
    Opened,
    Source,
    base_of_adapter,
    check_not_parent,
    check_output,
    data_of,
    open_decoder,
)
from burnish.pipeline.predicted import predicted_merge_peak
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.task_gate import check_score_drop, compare_on_task
from burnish.train.adapter import load_adapter
from burnish.train.adapter_sums import check_weights, load_adapters
from burnish.train.lora import merge_adapter


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What `burnish merge --json` prints.

    Attributes:
        adapter: the adapters' folders, joined by " + ".
        weights: one for each.
        onto: "original" or "dequantized", the base's weights that the adapters were added to.
        reason: why those.
        trials: what both came to on the held-out rows; empty where there was nothing to choose.
    """

    out: str
    adapter: str
    weights: list[float]
    base: str
    onto: str
    reason: str
    trials: list[MergeTrial]
    dtype: str
    seconds: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    disk_bytes: int
    merged_linears: int
    gate: GateResult


def merge(
    adapter: str | Sequence[str],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    onto: str = "auto",
    dtype: str = "auto",
    source: Source | None = None,
    data: str | None = None,
    limits: GateLimits = MERGE_LIMITS,
    gate_options: GateOptions | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeRecord:
    """Merge adapters into their base and prove that nothing was lost.

    Products are summed in float32 and stored in `dtype`. An adapter that was trained over quantized weights is tried on
    the original weights and on the dequantized ones, and what answers held-out rows better is kept. The written folder
    is read back and compared with the same base plus unmerged adapters; past the limits its manifest says so and the
    error is raised.

    Args:
        adapter: an adapter's folder, ours or PEFT's, or several of one base.
        out: folder for the merged model.
        weights: of each adapter, in the same order; needed for several. One alone counts as it is (1).
        base: instead of the base that the adapters name.
        onto: "original", "dequantized" (adapters that say how their base was quantized) or "auto".
        dtype: of the written weights; "auto" keeps what the base's files hold.
        data: held-out rows for the gate; by default those the adapter was evaluated with, else the bundled task's.
        gate_options: how many answers the gate compares, and limits in the place of `limits`.

    Raises:
        ConfigError, CheckpointError: bad input.
        GateError: the merged model is not what the adapters were.
    """
    gate_options = gate_options or GateOptions()
    folder = check_output(out, overwrite=overwrite)
    merging = _Merging(adapter, weights, base=base, onto=onto, source=source or Source())
    asked = parse_dtype(dtype) if dtype != "auto" else None
    with MemoryMeter() as meter:
        progress("Merging", 0, 4, "loading")
        trained_on = merging.frozen if merging.onto != "original" else None
        parent = merging.open(trained_on)
        check_not_parent(folder, parent)
        check_score_drop(gate_options, data=data, recorded=data_of(parent))
        stored = asked or parse_dtype("auto", read_config(parent.folder))
        predicted = predicted_merge_peak(parent.decoder, rank=merging.rank)
        examples = held_out(
            parent.tokenizer, data=data, recorded=data_of(parent), longest=parent.decoder.config.max_position_embeddings
        ).examples
        progress("Merging", 1, 4, "merging")
        trials: list[MergeTrial] = []
        onto, reason = merging.onto, merging.reason
        if onto == "auto":
            for place in ("original", "dequantized"):
                merged, _ = merging.merged(place, stored)
                trials.append(trial_of(place, compare_models(merged, parent.decoder, examples)))
                del merged
            onto, reason = better(trials)
        merged, names = merging.merged(onto, stored)
        save_decoder(merged, folder, source=parent.folder, dtype=stored)
        withdraw_manifest(folder)
        progress("Merging", 2, 4, "reading back")
        del merged
        if onto == "original" and trained_on is not None:
            parent = merging.open(None)
        child = load_model(folder, dtype=torch.float32, device=merging.source.device)
        progress("Merging", 3, 4, "comparing")
        comparison = compare_models(child, parent.decoder, examples)
        progress("Merging", 4, 4, "compared")
    task = compare_on_task(
        child,
        parent.decoder,
        parent.tokenizer,
        data=data,
        recorded=data_of(parent),
        num_rows=gate_options.rows,
        progress=progress,
    )
    gate = judge(comparison, gate_options.applied(limits), task=task)
    record = MergeRecord(
        out=str(folder),
        adapter=" + ".join(merging.adapters),
        weights=merging.weights,
        base=parent.name,
        onto=onto,
        reason=reason,
        trials=trials,
        dtype=str(stored or child.dtype).removeprefix("torch."),
        seconds=meter.reading().seconds,
        peak_memory_bytes=meter.growth_bytes,
        predicted_peak_bytes=predicted,
        disk_bytes=folder_bytes(folder),
        merged_linears=len(names),
        gate=gate,
    )
    write_manifest(
        folder,
        kind="merged",
        inputs={"base": parent.as_input(), **merging.as_inputs()},
        config={
            "dtype": dtype,
            "weights": merging.weights,
            "onto": onto,
            "base_format": None if merging.frozen is None else merging.frozen.to_dict(),
        },
        data=data_of(parent),
        figures=to_plain(record),
        gate=to_plain(gate),
        tokenizer=parent.tokenizer,
    )
    if not gate.passed:
        raise gate_error(
            f"the merged model {folder}",
            gate,
            remedy="Keep it with a finer --dtype (float32), or serve the adapter unmerged.",
        )
    return record


class _Merging:
    """What is merged into what: checked, and opened as often as it is needed.

    Attributes:
        frozen: how the base was quantized while the adapters were trained; None if it was not.
        onto: "original", "dequantized", or "auto" where both are to be tried.
        reason: why, unless both are.
    """

    def __init__(
        self,
        adapter: str | Sequence[str],
        weights: Sequence[float] | None,
        *,
        base: str | None,
        onto: str,
        source: Source,
    ) -> None:
        self.adapters = [adapter] if isinstance(adapter, str) else list(adapter)
        if not self.adapters:
            raise ConfigError("there is no adapter to merge")
        for each in self.adapters:
            if not is_adapter_folder(each):
                raise _no_adapter(each)
        if weights is None and len(self.adapters) > 1:
            raise ConfigError("several adapters need weights", remedy="Give one for each: --weights 0.7,0.3")
        self.weights = [1.0] if weights is None else [float(weight) for weight in weights]
        check_weights(self.weights, len(self.adapters))
        self.base = _common_base(self.adapters, base)
        # The sum is exact in float32 whatever the base is stored in.
        self.source = replace(source, dtype="float32")
        if onto not in ONTO:
            raise ConfigError("onto is not known", got=repr(onto), expected=", ".join(ONTO))
        self.frozen = _common_format(self.adapters) if onto != "original" else None
        if onto == "dequantized" and self.frozen is None:
            raise ConfigError(
                f"{self.adapters[0]} does not say that its base was quantized", remedy="Use --onto original."
            )
        self.onto, self.reason = onto, "as asked"
        if onto == "auto" and self.frozen is None:
            self.onto, self.reason = "original", "the adapter was trained on these weights"

    @property
    def rank(self) -> int:
        """Of all adapters together."""
        return sum(int(read_adapter_config(each)["r"]) for each in self.adapters)

    def open(self, frozen: FrozenFormat | None) -> Opened:
        """The base in float32, or frozen as told, with the adapters on it."""
        opened = open_decoder(self.base, self.source, frozen=frozen)
        if len(self.adapters) == 1 and self.weights == [1.0]:
            load_adapter(opened.decoder, self.adapters[0])
        else:
            load_adapters(opened.decoder, self.adapters, self.weights)
        return replace(opened, adapter=Path(self.adapters[0]))

    def merged(self, onto: str, stored: torch.dtype | None) -> tuple[Decoder, list[str]]:
        """The merged model, rounded to what will be stored, and the names of its merged linears."""
        opened = self.open(self.frozen if onto == "dequantized" else None)
        dequantize_in_place(opened.decoder)
        names = merge_adapter(opened.decoder)
        if stored not in (None, torch.float32):
            for parameter in opened.decoder.parameters():
                parameter.data = parameter.data.to(stored).float()
        return opened.decoder, names

    def as_inputs(self) -> dict[str, object]:
        """For the manifest."""
        if len(self.adapters) == 1:
            return {"adapter": describe_input(Path(self.adapters[0]))}
        return {f"adapter {number}": describe_input(Path(each)) for number, each in enumerate(self.adapters, 1)}


def _no_adapter(folder: str) -> ConfigError:
    if (Path(folder) / "config.json").is_file():
        return ConfigError(
            f"{folder} is a model already, not an adapter: there is nothing to merge",
            remedy=f"Use it as it is: burnish chat {folder}, or burnish quantize {folder} --out DIR.",
        )
    if not Path(folder).exists():
        return ConfigError(f"there is no folder {folder}", expected="an adapter that burnish tune or PEFT wrote")
    return ConfigError(f"{folder} is no adapter", expected="a folder with adapter_config.json")


def _common_base(adapters: Sequence[str], base: str | None) -> str:
    bases = list(dict.fromkeys(base_of_adapter(Path(each), base) for each in adapters))
    if len(bases) > 1:
        raise ConfigError(
            "the adapters name different bases",
            got=", ".join(bases),
            remedy="Name the one that all were trained on with --base.",
        )
    return bases[0]


def _common_format(adapters: Sequence[str]) -> FrozenFormat | None:
    found = [read_base_format(each) for each in adapters]
    if any(record != found[0] for record in found):
        raise ConfigError(
            "the adapters were trained on differently quantized bases",
            got=", ".join("none" if record is None else str(record.get("kind")) for record in found),
            remedy="Use --onto original.",
        )
    return None if found[0] is None else FrozenFormat.from_dict(found[0])
