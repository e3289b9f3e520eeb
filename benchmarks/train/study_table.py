"""Fine-tune, merge, quantize, infer: a published table of bloom, falcon and codegen2 on one A100 with 40 GB.

    python benchmarks/train/study_table.py                                   # predicted for all; small shapes measured
    python benchmarks/train/study_table.py --measure bloom-1b1,codegen2-1b   # the published shapes that fit here
    python benchmarks/train/study_table.py --measure bloom-7b1,falcon-7b --device cuda

Predicted rows are `burnish plan`'s on an A100 with 40 GB. Measured rows are burnish's own commands on random weights in
the shape, each in a process of its own: load and tune (the row's method, 8 rows of the bundled text-to-SQL a step),
merge, quantize to GPTQ 8-bit, and one request on the merged model in float32, int8 and int4. Their bytes are what a
process takes beyond its libraries; predictions beside them are the records' own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from measured_stages import MEASURED, measure_row
from table import aligned  # also puts the folder above on the path
from turns import write_record

from burnish.measure.hardware import hardware_record, version_record
from burnish.plan.options import PlanOptions
from burnish.plan.planning import plan

HERE = Path(__file__).resolve().parent
GIB = 2**30
DEVICE = "a100-40g"
INFERENCE = ("float32", "int8", "int4")


TOLD = ("load", "training", "merge", "quantize", "inference int8")


@dataclass(frozen=True)
class Row:
    """A published row.

    Attributes:
        method: "lora" over float32 weights, "qlora-8bit" or "qlora-4bit" (NF4, double quantization).
        parameters_m: millions.
        gb: of the stages in `TOLD`, as printed; None where nothing was.
        result: what the tuned and the quantized model answered.
    """

    shape: str
    method: str
    parameters_m: float
    gb: tuple[float | None, ...]
    result: str


PUBLISHED = (
    Row("bloom-1b1", "lora", 1065.3, (4.5, 21, 6, 6, 2), "good / bad"),
    Row("bloom-7b1", "lora", 7069.0, (27, None, None, None, None), "out of memory"),
    Row("bloom-7b1", "qlora-4bit", 7069.0, (6, 17, 31, 23, 9), "good / good"),
    Row("falcon-7b", "lora", 6921.7, (28, None, None, None, None), "out of memory"),
    Row("falcon-7b", "qlora-8bit", 6921.7, (8, 16, 28, 24, 8), "good / good"),
    Row("codegen2-1b", "lora", 1015.3, (4.5, 16, 5, None, None), "bad / -"),
)


def main() -> int:
    """Returns the exit status: 1 when a measurement failed."""
    flags = _arguments()
    record: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "device": DEVICE,
        "micro_batch_size": flags.micro_batch_size,
        "sequence_tokens": flags.sequence_tokens,
        "predicted": [predicted(row, flags) for row in PUBLISHED],
        "measured": [],
    }
    text = report_of(record)
    write_record(flags.out, record, text)
    wanted = [name for name in flags.measure.split(",") if name]
    with tempfile.TemporaryDirectory(dir=flags.work_folder) as folder:
        for name in wanted:
            for method in MEASURED[name].methods:
                print(f"{name}, {method}", flush=True)
                found = measure_row(name, method, flags, Path(folder))
                record["measured"].append(found)
                text = report_of(record)
                write_record(flags.out, record, text)
    print(f"\n{text}\n{flags.out}")
    return 1 if any(stage.get("error") for row in record["measured"] for stage in row["stages"].values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = ",".join(name for name, shape in MEASURED.items() if shape.small)
    parser.add_argument("--measure", default=small, help=f"of {', '.join(MEASURED)}; empty for none")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=512, help="of the longest row, in predictions")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="calibration rows")
    parser.add_argument("--device", default="cpu", help="to measure on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one command may take")
    parser.add_argument("--work-folder", type=Path, help="for models (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-train-study-table.json")
    flags = parser.parse_args()
    if unknown := set(filter(None, flags.measure.split(","))) - set(MEASURED):
        parser.error(f"--measure: there is no {', '.join(sorted(unknown))}; expected {', '.join(MEASURED)}")
    return flags


def predicted(row: Row, flags: argparse.Namespace) -> dict[str, Any]:
    """Bytes that each stage of a published row will need, and whether 40 GB hold them."""
    loaded_in = {"lora": "float32", "qlora-8bit": "int8", "qlora-4bit": "nf4"}[row.method]
    options = PlanOptions(
        dtype="float32" if row.method == "lora" else "auto",
        precision="float32" if row.method == "lora" else "auto",
        micro_batch_size=flags.micro_batch_size,
        sequence_tokens=flags.sequence_tokens,
        bits=8,
    )
    training = plan(row.shape, device=DEVICE, options=options, stages=(row.method, "merge", "quantize"))
    stages = {"load": _one(row.shape, "load", loaded_in)}
    names = (("training", row.method), ("merge", "merge"), ("quantize", "quantize"))
    stages |= {name: _bytes(training.stage(stage)) for name, stage in names}
    stages |= {f"inference {kind}": _one(row.shape, "inference", kind) for kind in INFERENCE}
    return {
        "shape": row.shape,
        "method": row.method,
        "parameters": training.parameters,
        "weight_bytes": training.weight_bytes,
        "stages": stages,
    }


def _one(shape: str, stage: str, kind: str) -> dict[str, Any]:
    """Loading, or one request of 128 + 128 tokens, with the weights in a format."""
    dtype = "float32" if kind == "float32" else "float16"
    options = PlanOptions(dtype=dtype, weight_format=kind, concurrency=1)
    return _bytes(plan(shape, device=DEVICE, options=options, stages=(stage,)).stage(stage))


def _bytes(stage: Any) -> dict[str, Any]:
    return {"bytes": stage.peak_bytes, "fits": stage.fits}


def report_of(record: dict[str, Any]) -> str:
    """The record's tables in Markdown."""
    facts = record["hardware"]
    parts = [
        f"# Fine-tune, merge, quantize, infer, {record['date']}",
        f"## Predicted for an A100 with 40 GB, beside what was published\n\nGiB at the peak of each stage; in brackets "
        f"the published GB; bold: does not fit. {record['micro_batch_size']} rows of at most "
        f"{record['sequence_tokens']} tokens per forward pass (the study's own batch is not known), without "
        f"checkpointing; inference is one request of 128 + 128 tokens.\n\n{_predicted_table(record['predicted'])}",
    ]
    if record["measured"]:
        parts.append(
            f"## Measured\n\n{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / GIB:.0f} GiB. "
            f"{', '.join(f'{name} {text}' for name, text in record['versions'].items())}. MiB beyond a process with "
            "its libraries; predicted / measured in brackets. Random weights, 8 rows a step.\n\n"
            f"{_measured_table(record['measured'])}"
        )
    return "\n\n".join(parts) + "\n"


def _predicted_table(rows: list[dict[str, Any]]) -> str:
    stages = list(rows[0]["stages"])
    table = [["model", "method", "M parameters", *stages, "published result"]]
    for published, row in zip(PUBLISHED, rows):
        told = dict(zip(TOLD, published.gb))
        cells = [_predicted_cell(row["stages"][stage], told.get(stage)) for stage in stages]
        parameters = f"{row['parameters'] / 1e6:.1f} ({published.parameters_m})"
        table.append([row["shape"], row["method"], parameters, *cells, published.result])
    return aligned(table)


def _predicted_cell(stage: dict[str, Any], told: float | None) -> str:
    size = f"{stage['bytes'] / GIB:.1f}"
    return (size if stage["fits"] else f"**{size}**") + ("" if told is None else f" ({told:g})")


def _measured_table(rows: list[dict[str, Any]]) -> str:
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    table = [["model", "method", "M parameters", *stages]]
    for row in rows:
        cells = [_measured_cell(row["stages"].get(stage)) for stage in stages]
        table.append([row["name"], row["method"], f"{row['parameters'] / 1e6:.1f}", *cells])
    return aligned(table)


def _measured_cell(stage: dict[str, Any] | None) -> str:
    if stage is None:
        return "-"
    if "error" in stage:
        return stage["error"][:40]
    size = f"{stage['bytes'] / 2**20:.0f}"
    return size if not stage.get("predicted") else f"{size} ({stage['predicted'] / stage['bytes']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
