"""All of burnish's own measurements in one command, held against the project's targets.

    python benchmarks/works.py MODEL                                    # bfloat16, int8, int4; everything
    python benchmarks/works.py MODEL --only limits,w2 --configs int8    # a part of it
    python benchmarks/works.py MODEL --quick                            # does it run at all; its figures mean nothing

MODEL is a folder of the 1.1B Llama shape (burnish synth tinyllama-1.1b --out MODEL). Every measurement runs in a
process of its own, and what is known is written after each of them. Other systems are measured by compare.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from session import cores, kernels, table
from targets import lines_of

from burnish.measure.hardware import hardware_record, version_record

HERE = Path(__file__).parent
CONFIGS = {"bf16": "none", "int8": "int8", "int4": "int4"}
ONCE = ("limits", "w6", "memory", "quality")
EACH = ("w1", "w2", "w3", "w4", "w5")
ORDER = ("limits", *EACH, "w6", "memory", "quality")
QUICK = {
    "limits": ["--mib", "128", "--passes", "3"],
    "w1": ["--runs", "1", "--requests", "4", "--output-tokens", "4"],
    "w2": ["--runs", "1", "--output-tokens", "8"],
    "w3": ["--requests", "6", "--longest", "20", "--w1-output-tokens", "2"],
    "w4": ["--runs", "1", "--requests", "3", "--system-tokens", "64", "--output-tokens", "4", "--concurrency", "2"],
    "w5": ["--runs", "1", "--questions", "4"],
    "w6": ["--requests", "2", "--input-tokens", "16", "--output-tokens", "3"],
    "memory": ["--quantizations", "int8"],
    "quality": ["--kl-rows", "4", "--rows", "20"],
}


def main() -> int:
    """Returns the exit status: 1 when a measurement failed; missing a target is a result."""
    flags = _arguments()
    record: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "kernels": kernels(),
        "threads": flags.threads,
        "quick": flags.quick,
        "model": Path(flags.model).name,
        "measured": [],
        "failures": [],
    }
    plan = [
        (work, config)
        for work in ORDER
        if work in flags.only.split(",")
        for config in (["-"] if work in ONCE else flags.configs.split(","))
    ]
    for count, (work, config) in enumerate(plan, 1):
        print(f"[{count}/{len(plan)}] {work} {config}: ", end="", flush=True)
        load, started = os.getloadavg()[0], time.perf_counter()
        found = _run(work, config, flags)
        seconds = time.perf_counter() - started
        if isinstance(found, str):
            last = found.splitlines()[-1]
            record["failures"].append({"work": work, "config": config, "error": last})
            print(f"failed after {seconds:.0f} s\n{found}", flush=True)
        else:
            # The load before it began: others who computed meanwhile spoil the figures.
            entry = {"config": config, "load_average": round(load, 2), "seconds": round(seconds, 1), **found}
            record["measured"].append(entry)
            print(f"{seconds:.0f} s", flush=True)
        _write(record, flags)
    print(f"\n{_text(record, flags)}\n{flags.out}\n{flags.out.with_suffix('.md')}")
    return 1 if record["failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model that W1 to W5 run on")
    parser.add_argument("--w6-model", help="folder of the model for W6, in the shape of Llama-3.2-1B (default: MODEL)")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--only", default=",".join(ORDER), metavar="WORKS")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--kv-dtype", help="of the KV cache, everywhere")
    parser.add_argument("--tuned", type=Path, help="folder of the tuned model for W5 and quality; made when absent")
    parser.add_argument("--stories", type=Path, help="folder of stories260k, for quality")
    parser.add_argument("--stories-text", type=Path, help="held-out stories")
    parser.add_argument("--rows", help="file of text-to-SQL rows, for W5")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that spells them")
    parser.add_argument("--quick", action="store_true", help="everything as small as it gets")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one measurement may take")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}-works.json")
    flags = parser.parse_args()
    for name, known in (("only", ORDER), ("configs", tuple(CONFIGS))):
        if unknown := set(getattr(flags, name).split(",")) - set(known):
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    return flags


def _run(work: str, config: str, flags: argparse.Namespace) -> dict[str, Any] | str:
    """The script's record, or the end of what it said when it gave none."""
    command = [sys.executable, *_command(work, config, flags), "--json", "--threads", str(flags.threads)]
    command += QUICK[work] if flags.quick else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=flags.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {flags.timeout:.0f} s"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return (done.stderr or done.stdout).strip()[-2000:] or f"ended with {done.returncode}, without a word"
    return json.loads(lines[-1])


def _command(work: str, config: str, flags: argparse.Namespace) -> list[str]:
    quantize = ["--quantize", CONFIGS.get(config, "none")]
    cache = ["--kv-dtype", flags.kv_dtype] if flags.kv_dtype else []
    tuned = ["--tuned", str(flags.tuned)] if flags.tuned else []
    stories = _given(("--stories", flags.stories), ("--stories-text", flags.stories_text))
    rows = _given(("--rows", flags.rows), ("--tokenizer", flags.tokenizer))
    commands = {
        "limits": ["limits.py"],
        "w1": ["w1_w2.py", flags.model, "--work", "w1", *quantize, *cache],
        "w2": ["w1_w2.py", flags.model, "--work", "w2", *quantize, *cache],
        "w3": ["w3_mixed.py", flags.model, *quantize, *cache],
        "w4": ["w4_prefix.py", flags.model, *quantize, *cache],
        "w5": ["w5_copying.py", flags.model, *quantize, *cache, *tuned, *rows],
        "w6": ["w6_cache.py", flags.w6_model or flags.model, *cache],
        # The W1 of each configuration tells its own peak.
        "memory": ["memory.py", flags.model, "--parts", "load", *cache],
        "quality": ["quality.py", *cache, *tuned, *stories],
    }
    script, *rest = commands[work]
    return [str(HERE / script), *rest]


def _given(*options: tuple[str, Any]) -> list[str]:
    return [part for option, value in options if value is not None for part in (option, str(value))]


def _write(record: dict[str, Any], flags: argparse.Namespace) -> None:
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [asdict(line) for line in lines_of(record["measured"], model=Path(flags.model))]
    flags.out.write_text(json.dumps({**record, "lines": lines}, indent=1) + "\n", encoding="utf-8")
    flags.out.with_suffix(".md").write_text(_text(record, flags), encoding="utf-8")


def _text(record: dict[str, Any], flags: argparse.Namespace) -> str:
    facts = record["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    loads = [entry["load_average"] for entry in record["measured"]]
    marks = {True: "met", False: "missed", None: ""}
    rows = [["work", "weights", "figure", "measured", "target", ""]]
    rows += [
        [line.work, line.config, line.figure, line.value, line.target, marks[line.good]]
        for line in lines_of(record["measured"], model=Path(flags.model))
    ]
    parts = [
        f"# burnish against its targets, {record['date']}",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"{', '.join(facts['instruction_sets'])}; {record['threads']} threads, kernels {record['kernels']}. "
        f"{versions}. Model: {record['model']}. Load average before each measurement: {min(loads, default=0)} to "
        f"{max(loads, default=0)}.",
        *(["Quick: these figures say that everything runs, and nothing else."] if record["quick"] else []),
        table(rows),
        *(f"Failed: {fail['work']} {fail['config']}: {fail['error']}" for fail in record["failures"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
