"""`merge`: an adapter becomes part of its base's weights, and the result has to be what the adapter was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from burnish.compress.loading import load_model
from burnish.errors import ConfigError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.adapter_files import is_adapter_folder, read_adapter_config
from burnish.models.loading import parse_dtype, save_decoder
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import held_out
from burnish.pipeline.gates import MERGE_LIMITS, GateResult, gate_error, judge
from burnish.pipeline.manifest import describe_input, write_manifest
from burnish.pipeline.opening import Source, check_output, data_of, open_decoder
from burnish.pipeline.predicted import predicted_merge_peak
from burnish.pipeline.progress import Progress, silent
from burnish.train.lora import merge_adapter


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """What `burnish merge --json` prints."""

    out: str
    adapter: str
    base: str
    dtype: str
    seconds: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    disk_bytes: int
    merged_linears: int
    gate: GateResult


def merge(
    adapter: str,
    *,
    out: str | Path,
    base: str | None = None,
    dtype: str = "auto",
    source: Source | None = None,
    data: str | None = None,
    limits: GateLimits = MERGE_LIMITS,
    overwrite: bool = False,
    progress: Progress = silent,
) -> MergeRecord:
    """Merge an adapter into its base and prove that nothing was lost.

    Products are summed in float32 and stored in `dtype`. The written folder is read back and compared with base plus
    adapter on held-out text; past the limits its manifest says so and the error is raised.

    Args:
        adapter: an adapter's folder, ours or PEFT's.
        out: folder for the merged model.
        base: instead of the base that the adapter names.
        dtype: of the written weights; "auto" keeps what the base's files hold.
        data: held-out rows for the gate; by default those the adapter was evaluated with, else the bundled task's.

    Raises:
        ConfigError, CheckpointError: bad input.
        GateError: the merged model is not what the adapter was.
    """
    source = source or Source()
    if not is_adapter_folder(adapter):
        raise ConfigError(f"{adapter} is no adapter", expected="a folder with adapter_config.json")
    folder = check_output(out, overwrite=overwrite)
    stored = parse_dtype(dtype) if dtype != "auto" else None
    with MemoryMeter() as meter:
        progress("Merging", 0, 4, "loading")
        # The sum is exact in float32 whatever the base is stored in.
        parent = open_decoder(adapter, _in_float32(source), base=base)
        predicted = predicted_merge_peak(parent.decoder, rank=int(read_adapter_config(adapter)["r"]))
        examples = held_out(
            parent.tokenizer, data=data, recorded=data_of(parent), longest=parent.decoder.config.max_position_embeddings
        )
        progress("Merging", 1, 4, "merging")
        merged = open_decoder(adapter, _in_float32(source), base=base)
        names = merge_adapter(merged.decoder)
        save_decoder(merged.decoder, folder, source=parent.folder, dtype=stored or _stored_dtype(parent.folder))
        progress("Merging", 2, 4, "reading back")
        del merged
        child = load_model(folder, dtype=torch.float32, device=source.device)
        progress("Merging", 3, 4, "comparing")
        gate = judge(compare_models(child, parent.decoder, examples.examples), limits)
        progress("Merging", 4, 4, gate.verdict)
    record = MergeRecord(
        out=str(folder),
        adapter=adapter,
        base=parent.name,
        dtype=str(stored or _stored_dtype(parent.folder) or child.dtype).removeprefix("torch."),
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
        inputs={"base": parent.as_input(), "adapter": describe_input(Path(adapter))},
        config={"dtype": dtype},
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


def _in_float32(source: Source) -> Source:
    return Source(
        dtype="float32",
        device=source.device,
        threads=source.threads,
        revision=source.revision,
        offline=source.offline,
        allow_pickle=source.allow_pickle,
    )


def _stored_dtype(folder: Path) -> torch.dtype | None:
    from burnish.models.checkpoint import read_config

    return parse_dtype("auto", read_config(folder))
