"""`export`: a model in another program's format, compared with its source by running it in that program."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish._optional import require
from burnish.compress.ctranslate2_export import CTRANSLATE2_FORMATS, export_ctranslate2
from burnish.compress.dense import dequantize_linears
from burnish.compress.gguf_export import GGUF_FORMATS, export_gguf
from burnish.errors import CheckpointError, ConfigError
from burnish.measure.compare import GateLimits, compare_models
from burnish.measure.json_values import to_plain
from burnish.measure.memory import MemoryMeter
from burnish.models.checkpoint import read_config
from burnish.models.loading import load_decoder, parse_dtype, save_decoder
from burnish.pipeline.disk import folder_bytes
from burnish.pipeline.examples import held_out
from burnish.pipeline.foreign_models import CTranslate2Model, LlamaCppModel
from burnish.pipeline.gates import MERGE_LIMITS, QUANTIZE_LIMITS, GateResult, gate_error, judge
from burnish.pipeline.manifest import MANIFEST_NAME, withdraw_manifest, write_manifest
from burnish.pipeline.opening import Opened, Source, check_not_parent, check_output, data_of, open_decoder
from burnish.pipeline.progress import Progress, silent

FORMATS = {
    "gguf": GGUF_FORMATS,
    "ctranslate2": CTRANSLATE2_FORMATS,
    "safetensors": ("auto", "float32", "bfloat16", "float16"),
}
"""What can be exported to, and each one's formats; the first is the default."""
GATE_WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What `burnish export --json` prints.

    Attributes:
        kept_f16: tensors of a GGUF file whose rows the format's blocks do not divide.
        notes: what the other program will do otherwise.
        gate: the comparison, run by `compared_by`; None where that program is not installed.
    """

    out: str
    model: str
    to: str
    format: str
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    kept_f16: list[str]
    notes: list[str]
    compared_by: str
    gate: GateResult | None


def export(
    model: str,
    *,
    to: str,
    out: str | Path,
    format: str | None = None,
    data: str | None = None,
    limits: GateLimits | None = None,
    source: Source | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportRecord:
    """Write a model for another program, and compare what that program makes of it with the source.

    Args:
        model: folder, bundled name or hub id; dense or quantized.
        to: "gguf" (a file), "ctranslate2" or "safetensors" (folders).
        format: one of `FORMATS[to]`.
        data: held-out rows for the gate; defaults as in `merge`.
        limits: what the export may lose; by its bits when None.

    Raises:
        ConfigError, CheckpointError, DataError: bad input, or a model that has no place in the format.
        MissingExtraError: the package that writes the format is not installed.
        GateError: the other program's answers are worse than the limits allow; the manifest says so.
    """
    source = source or Source()
    if to not in FORMATS:
        raise ConfigError("unknown format to export to", got=to, expected=", ".join(FORMATS))
    format = format or FORMATS[to][0]
    if format not in FORMATS[to]:
        raise ConfigError(f"unknown --format for {to}", got=format, expected=", ".join(FORMATS[to]))
    if to == "gguf":
        require("gguf", extra="gguf")
    elif to == "ctranslate2":
        require("ctranslate2", extra="ct2")
    limits = limits or limits_of(format)
    path = _check_file(out, overwrite=overwrite) if to == "gguf" else check_output(out, overwrite=overwrite)
    home = path.parent if to == "gguf" else path
    manifest = f"{path.name}.burnish.json" if to == "gguf" else MANIFEST_NAME
    kept: list[str] = []
    notes: list[str] = []
    with MemoryMeter() as meter:
        opened = open_decoder(model, source)
        if opened.adapter is not None:
            raise ConfigError(f"{model} is an adapter", remedy="Merge it first: burnish merge ADAPTER --out DIR")
        check_not_parent(path, opened)
        if to == "gguf":
            report = export_gguf(
                opened.decoder,
                path,
                tokenizer=opened.tokenizer,
                format=format,
                name=Path(model).name,
                on_tensor=lambda done, total: progress("Writing tensors", done, total, ""),
            )
            kept, notes = list(report.kept_f16), list(report.notes)
        elif to == "ctranslate2":
            export_ctranslate2(opened.decoder, path, source=opened.folder, tokenizer=opened.tokenizer, format=format)
        else:
            dequantize_linears(opened.decoder)
            wanted = parse_dtype(format, read_config(opened.folder)) or opened.decoder.dtype
            save_decoder(opened.decoder, path, source=opened.folder, dtype=wanted)
        withdraw_manifest(home, name=manifest)
        compared_by, gate = _gate(opened, path, to=to, data=data, limits=limits, threads=source.threads)
    record = ExportRecord(
        out=str(path),
        model=model,
        to=to,
        format=format,
        seconds=meter.reading().seconds,
        peak_memory_bytes=meter.growth_bytes,
        disk_bytes=path.stat().st_size if path.is_file() else folder_bytes(path),
        kept_f16=kept,
        notes=notes,
        compared_by=compared_by,
        gate=gate,
    )
    write_manifest(
        home,
        kind="exported",
        inputs={"model": opened.as_input()},
        config={"to": to, "format": format},
        data=data_of(opened),
        figures=to_plain(record),
        gate=to_plain(gate),
        tokenizer=opened.tokenizer,
        name=manifest,
    )
    if gate is not None and not gate.passed:
        raise gate_error(f"the export {path}", gate, remedy="Try a --format of more bits, or --to safetensors.")
    return record


def limits_of(format: str) -> GateLimits:
    """What an export may lose by its format: 8 and 4 bits as a quantization of as many, else as a merge."""
    if format == "q4_0":
        return QUANTIZE_LIMITS[4]
    return QUANTIZE_LIMITS[8] if format == "q8_0" or format.startswith("int8") else MERGE_LIMITS


def _gate(
    opened: Opened, path: Path, *, to: str, data: str | None, limits: GateLimits, threads: int | None
) -> tuple[str, GateResult | None]:
    """Which program would compare, and the verdict where it is installed."""
    program = {"gguf": "llama.cpp", "ctranslate2": "CTranslate2", "safetensors": "burnish"}[to]
    if to == "gguf" and find_spec("llama_cpp") is None:
        return program, None
    window = min(opened.decoder.config.max_position_embeddings, GATE_WINDOW)
    examples = held_out(opened.tokenizer, data=data, recorded=data_of(opened), longest=window).examples
    child: Any
    try:
        if to == "gguf":
            child = LlamaCppModel(path, window=window, threads=threads)
        elif to == "ctranslate2":
            child = CTranslate2Model(path, threads=threads)
        else:
            child = load_decoder(path, dtype=opened.decoder.dtype)
        return program, judge(compare_models(child, opened.decoder, examples, window=window), limits)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{program} cannot run {path}: {reason}") from error


def _check_file(out: str | Path, *, overwrite: bool) -> Path:
    """The file to write, checked before the work."""
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder", expected="a file, such as model.gguf")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {path} is there already", remedy="Choose another name, or add --overwrite.")
    check_output(path.parent, overwrite=True)
    return path
