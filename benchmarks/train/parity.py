"""Loss parity: burnish and PEFT from the same adapter, on the same rows in the same order, step by step.

    python benchmarks/train/parity.py MODEL ROWS --peft ~/train-peers/peft/bin/python

PEFT draws the adapter and writes it; both load it. 50 steps at a constant rate of 1e-3, AdamW without weight decay,
gradients clipped at 1.0. Held against PEFT's loss at the last step: within 0.5 % in float32, 1 % in bfloat16 (PEFT with
its float32 adapters; the row with bfloat16 adapters says what PEFT's own two ways differ by).
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

from table import aligned, relative_difference  # also puts the folder above on the path
from turns import run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record

HERE = Path(__file__).resolve().parent
LIMITS = {"float32": 0.005, "bfloat16": 0.01}
SHOWN = (1, 4, 10, 25)


@dataclass(frozen=True)
class Run:
    """One trainer in one precision; `reference` is what the others of that precision are held against."""

    name: str
    script: str
    precision: str
    args: tuple[str, ...] = ()
    reference: bool = False


RUNS = (
    Run("PEFT float32", "peft_loop.py", "float32", ("--adapter-dtype", "float32"), reference=True),
    Run("burnish float32", "burnish_runner.py", "float32"),
    Run("PEFT bf16, float32 adapters", "peft_loop.py", "bfloat16", ("--adapter-dtype", "float32"), reference=True),
    Run("PEFT all bf16", "peft_loop.py", "bfloat16", ("--adapter-dtype", "bfloat16")),
    Run("burnish bf16", "burnish_runner.py", "bfloat16"),
)


def main() -> int:
    """Returns the exit status: 1 when a run failed or a limit of burnish's was passed."""
    flags = _arguments()
    record: dict[str, Any] = {
        "date": str(date.today()),
        "model": Path(flags.model).name,
        "hardware": hardware_record(),
        "versions": version_record(),
        "threads": flags.threads,
        "steps": flags.steps,
        "micro": flags.micro,
        "losses": {},
        "failures": {},
    }
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        drawn = _draw_adapter(flags, folder)
        for run in RUNS:
            if run.precision not in flags.precisions.split(","):
                continue
            print(f"{run.name}: ", end="", flush=True)
            found = run_for_result(_command(run, flags, drawn), threads=flags.threads, timeout=flags.timeout)
            if isinstance(found, str):
                record["failures"][run.name] = found.splitlines()[-1]
                print(f"failed\n{found}", flush=True)
            else:
                record["losses"][run.name] = found["losses"]
                print(f"{found['losses'][-1]:.4f}, {sum(found['step_s']):.0f} s", flush=True)
            text = report_of(record)
            write_record(flags.out, record, text)
    print(f"\n{text}\n{flags.out}")
    passed = all(difference <= limit for _, difference, limit in differences(record["losses"]))
    return 0 if passed and not record["failures"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("rows", help="rows as rows.py writes them")
    parser.add_argument("--peft", default=sys.executable, help="interpreter that has transformers and PEFT")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--micro", type=int, default=1, help="of PEFT; burnish's own is --burnish-micro")
    parser.add_argument("--burnish-micro", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-train-parity.json")
    return parser.parse_args()


def _draw_adapter(flags: argparse.Namespace, folder: str) -> str:
    """The folder of a fresh adapter, as PEFT draws it."""
    drawn = str(Path(folder) / "adapter")
    command = [flags.peft, str(HERE / "peft_loop.py"), flags.model, flags.rows, "--save-adapter", drawn]
    command += ["--precision", "float32", "--adapter-dtype", "float32", "--threads", str(flags.threads)]
    said = run_for_result(command, threads=flags.threads, timeout=flags.timeout)
    if not (Path(drawn) / "adapter_model.safetensors").is_file():
        raise SystemExit(f"PEFT wrote no adapter: {said}")
    return drawn


def _command(run: Run, flags: argparse.Namespace, adapter: str) -> list[str]:
    ours = run.script == "burnish_runner.py"
    return [
        *(sys.executable if ours else flags.peft, str(HERE / run.script), flags.model, flags.rows),
        *("--label", run.name, "--precision", run.precision, "--adapter", adapter, *run.args),
        *("--micro", str(flags.burnish_micro if ours else flags.micro), "--learning-rate", "1e-3"),
        *("--steps", str(flags.steps), "--warmup-steps", "0", "--threads", str(flags.threads)),
    ]


def differences(losses: dict[str, list[float]]) -> list[tuple[str, float, float]]:
    """(name, relative difference at the last step, limit) of burnish's runs whose reference is there."""
    found = []
    for run in RUNS:
        reference = next(one.name for one in RUNS if one.reference and one.precision == run.precision)
        if run.script == "burnish_runner.py" and run.name in losses and reference in losses:
            difference = relative_difference(losses[run.name][-1], losses[reference][-1])
            found.append((run.name, difference, LIMITS[run.precision]))
    return found


def report_of(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    losses, steps = record["losses"], record["steps"]
    shown = [step for step in (*SHOWN, steps) if step <= steps]
    rows = [["trainer", *(f"step {step}" for step in shown), "from PEFT at the end", "largest on the way"]]
    for run in RUNS:
        if run.name not in losses:
            continue
        mine = losses[run.name]
        reference = losses.get(next(one.name for one in RUNS if one.reference and one.precision == run.precision))
        apart = [relative_difference(a, b) for a, b in zip(mine, reference or [])]
        ends = ["-", "-"] if run.reference or not apart else [f"{100 * apart[-1]:.3f} %", f"{100 * max(apart):.3f} %"]
        rows.append([run.name, *(f"{mine[step - 1]:.5f}" for step in shown), *ends])
    verdicts = [
        f"{name}: {100 * difference:.3f} % (at most {100 * limit:g} %): {'met' if difference <= limit else 'missed'}"
        for name, difference, limit in differences(losses)
    ]
    facts = record["hardware"]
    parts = [
        f"# Loss parity with PEFT, {record['date']}",
        f"{record['model']}, {steps} steps of 8 rows, from one adapter; {facts['cpu']}, {record['threads']} threads. "
        f"{', '.join(f'{name} {text}' for name, text in record['versions'].items())}.",
        aligned(rows),
        *verdicts,
        *(f"Failed: {name}: {error}" for name, error in record["failures"].items()),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
