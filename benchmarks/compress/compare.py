"""burnish's GPTQ beside llm-compressor's and GPTQModel's: the same model and samples, in turn, each where it lives.

    python benchmarks/compress/compare.py MODEL ROWS --llmcompressor ENV/bin/python [--gptqmodel ENV/bin/python]

Writes a JSON record and the same in Markdown, again after every turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from table import OURS, report_of  # also puts the folder above on the path
from turns import first_missing, run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record
from burnish.models.loading import load_config

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Returns the exit status: 1 when a quantizer that is here failed."""
    flags = _arguments()
    runners = {OURS: (sys.executable, "burnish_runner.py")}
    for name, python in (("llm-compressor", flags.llmcompressor), ("GPTQModel", flags.gptqmodel)):
        if python is not None:
            runners[name] = (python, f"{name.replace('-', '').lower()}_runner.py")
    for python, _ in runners.values():
        if missing := first_missing(python, [flags.model, flags.rows]):
            raise SystemExit(f"not here: {missing}")
    shape = load_config(flags.model)
    record: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "model": {"numbers": shape.num_parameters(), "hidden_size": shape.hidden_size, "num_layers": shape.num_layers},
        "samples": flags.samples,
        "length": flags.length,
        "bits": flags.bits,
        "group_size": flags.group_size,
        "threads": flags.threads,
        "results": [],
        "failures": [],
    }
    for turn in range(1, flags.rounds + 1):
        for name, (python, script) in runners.items():
            print(f"round {turn}, {name}: ", end="", flush=True)
            load = round(os.getloadavg()[0], 2)
            with tempfile.TemporaryDirectory() as out:
                found = run_for_result(
                    _command(python, script, out, flags), threads=flags.threads, timeout=flags.timeout
                )
            if isinstance(found, str):
                record["failures"].append({"round": turn, "name": name, "error": found.splitlines()[-1]})
                print(f"failed\n{found}", flush=True)
            else:
                record["results"].append({"round": turn, "load_average": load, **found})
                print(f"{found['wall_s']} s, {found['cpu_s']} s of CPU, {found['increase_mib']} MiB", flush=True)
            write_record(flags.out, record, report_of(record))
    print(f"\n{report_of(record)}\n{flags.out}")
    return 1 if record["failures"] else 0


def _command(python: str, script: str, out: str, flags: argparse.Namespace) -> list[str]:
    sizes = {
        "--samples": flags.samples,
        "--length": flags.length,
        "--bits": flags.bits,
        "--group-size": flags.group_size,
        "--threads": flags.threads,
    }
    options = [text for option, value in sizes.items() for text in (option, str(value))]
    return [python, str(HERE / script), flags.model, flags.rows, str(Path(out) / "child"), *options]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("rows", help="token ids, as benchmarks/train/rows.py writes them")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="interpreter of an environment that has it")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="interpreter of an environment that has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one turn may take")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-compress-135m.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
