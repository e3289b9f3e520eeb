"""What each technique saves in time and memory: the Llama-3.2-1B study's question, asked of burnish.

    python benchmarks/train/study_llama32.py MODEL ROWS --peft ~/train-peers/peft/bin/python --rounds 2

The study (one P100, Alpaca rows) set mixed precision, gradient accumulation, gradient checkpointing, LoRA and mixes of
them against plain full fine-tuning, and found LoRA the best: about 37 % less of both. Here: the same techniques and
rows, 8 rows a step, on the shape that MODEL has. With --peft, transformers' own vanilla (padded batches) stands beside
burnish's, which has no padding; `--peers all` runs every technique there too.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from table import aligned, saved, spread  # also puts the folder above on the path
from turns import run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record

HERE = Path(__file__).resolve().parent
VANILLA = "vanilla"
TARGET = 0.6  # of both, for LoRA against vanilla
PUBLISHED = 0.37


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A row of the study: what is trained, in which precision, in which pieces."""

    name: str
    method: str = "full"
    precision: str = "float32"
    micro: int = 8
    checkpoint_every: int = 0

    def flags(self, system: str) -> list[str]:
        """Of the runner. LoRA on transformers: PEFT's own way, with float32 adapters on the frozen weights."""
        flags = ["--method", self.method, "--precision", self.precision, "--micro", str(self.micro)]
        flags += ["--checkpoint-every", str(self.checkpoint_every)]
        return flags if system == "burnish" else [*flags, "--adapter-dtype", "float32"]


TECHNIQUES = (
    Technique(name=VANILLA),
    Technique(name="mixed precision", precision="autocast"),
    Technique(name="accumulation", micro=1),
    Technique(name="checkpointing", checkpoint_every=1),
    Technique(name="mixed precision, accumulation", precision="autocast", micro=1),
    Technique(name="accumulation, checkpointing", micro=1, checkpoint_every=1),
    Technique(name="mixed precision, checkpointing", precision="autocast", checkpoint_every=1),
    Technique(name="all three", precision="autocast", micro=1, checkpoint_every=1),
    Technique(name="LoRA", method="lora"),
    Technique(name="LoRA, accumulation", method="lora", micro=1),
    Technique(name="LoRA, checkpointing", method="lora", checkpoint_every=1),
    Technique(name="LoRA, mixed precision", method="lora", precision="bfloat16"),
    Technique(name="LoRA, mixed precision, accumulation", method="lora", precision="bfloat16", micro=1),
    Technique(name="LoRA, all three", method="lora", precision="bfloat16", micro=1, checkpoint_every=1),
)


def main() -> int:
    """Returns the exit status: 1 when a run failed; missing the target is a result."""
    flags = _arguments()
    turns = [
        (turn, system, technique)
        for turn in range(1, flags.rounds + 1)
        for technique in TECHNIQUES
        if flags.only is None or technique.name in flags.only
        for system in _systems(flags, technique)
    ]
    record: dict[str, Any] = {
        "date": str(date.today()),
        "model": Path(flags.model).name,
        "hardware": hardware_record(),
        "versions": version_record(),
        "threads": flags.threads,
        "rounds": flags.rounds,
        "steps": flags.steps,
        "warmup_steps": flags.warmup_steps,
        "results": [],
        "failures": [],
    }
    text = ""
    for count, (turn, system, technique) in enumerate(turns, 1):
        print(f"[{count}/{len(turns)}] round {turn}, {system}, {technique.name}: ", end="", flush=True)
        load = os.getloadavg()[0]
        found = run_for_result(_command(system, technique, flags), threads=flags.threads, timeout=flags.timeout)
        place = {"round": turn, "system": system, "technique": technique.name}
        if isinstance(found, str):
            record["failures"].append({**place, "error": found.splitlines()[-1]})
            print(f"failed\n{found}", flush=True)
        else:
            record["results"].append({**found, **place, "load_average": round(load, 2)})
            print(f"{found['s_per_step']:.2f} s a step, {found['increase_mib']:.0f} MiB", flush=True)
        text = report_of(record)
        write_record(flags.out, record, text)
    print(f"\n{text}\n{flags.out}")
    return 1 if record["failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("rows", help="rows as rows.py writes them")
    parser.add_argument("--peft", help="interpreter that has transformers and PEFT")
    parser.add_argument("--peers", choices=("vanilla", "all"), default="vanilla", help="what --peft runs")
    parser.add_argument("--only", action="append", metavar="TECHNIQUE", help="leave out all others; may be repeated")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-train-llama32-study.json"
    )
    flags = parser.parse_args()
    if unknown := set(flags.only or ()) - {technique.name for technique in TECHNIQUES}:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    return flags


def _systems(flags: argparse.Namespace, technique: Technique) -> list[str]:
    peer = flags.peft is not None and (flags.peers == "all" or technique.name == VANILLA)
    return ["transformers", "burnish"] if peer else ["burnish"]


def _command(system: str, technique: Technique, flags: argparse.Namespace) -> list[str]:
    ours = system == "burnish"
    script = "burnish_runner.py" if ours else "peft_loop.py"
    return [
        *(sys.executable if ours else flags.peft, str(HERE / script), flags.model, flags.rows),
        *("--steps", str(flags.steps), "--warmup-steps", str(flags.warmup_steps), "--threads", str(flags.threads)),
        *technique.flags(system),
    ]


def savings(results: list[dict[str, Any]], system: str) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Shares of time per token and of memory saved against `system`'s vanilla: per round, by (system, technique)."""
    base = {one["round"]: one for one in results if (one["system"], one["technique"]) == (system, VANILLA)}
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for one in results:
        if one["round"] in base:
            vanilla = base[one["round"]]
            time_saved, memory_saved = found.setdefault((one["system"], one["technique"]), ([], []))
            time_saved.append(saved(1 / one["tokens_per_s"], 1 / vanilla["tokens_per_s"]))
            memory_saved.append(saved(one["increase_mib"], vanilla["increase_mib"]))
    return found


def report_of(record: dict[str, Any]) -> str:
    """The record's table in Markdown, with the verdict on LoRA."""
    results = record["results"]
    own = {system: savings(results, system) for system in ("burnish", "transformers")}
    heading = ["system", "technique", "tokens/s", "s/step", "over the model MiB", "peak MiB", "time %", "memory %"]
    rows = [[*heading, "time %, transformers' vanilla", "memory %"]]
    for system, technique in dict.fromkeys((one["system"], one["technique"]) for one in results):
        mine = [one for one in results if (one["system"], one["technique"]) == (system, technique)]
        row = [system, technique, spread([one["tokens_per_s"] for one in mine], 0)]
        row += [spread([one["s_per_step"] for one in mine], 2, extremes=False)]
        row += [spread([one["increase_mib"] for one in mine], 0), f"{max(one['peak_mib'] for one in mine):.0f}"]
        for base in (own[system], own["transformers"]):
            row += [_change(values) for values in base.get((system, technique), ([], []))]
        rows.append(row)
    facts = record["hardware"]
    parts = [
        f"# What each technique saves, {record['date']}",
        f"{record['model']}, Alpaca rows, 8 a step, steps {record['warmup_steps'] + 1} to "
        f"{record['warmup_steps'] + record['steps']}, {record['rounds']} rounds in turn. {facts['cpu']}, "
        f"{facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB; {record['threads']} threads. "
        f"{', '.join(f'{name} {text}' for name, text in record['versions'].items())}.",
        "time %: of the time per token; memory %: of the peak over the loaded model; first against the same system's "
        f"vanilla, then against transformers'. Published for LoRA on a P100: about -{100 * PUBLISHED:.0f} % of both.",
        aligned(rows),
        *_verdicts(own),
        *(f"Failed: {fail['system']} {fail['technique']}: {fail['error']}" for fail in record["failures"]),
    ]
    return "\n\n".join(parts) + "\n"


def _verdicts(own: dict[str, dict[tuple[str, str], tuple[list[float], list[float]]]]) -> list[str]:
    """Whether one setting of LoRA saves enough of both, against each vanilla that is there."""
    lines = []
    for base, found in own.items():
        pairs = [
            (min(median(times), median(memories)), name, median(times), median(memories))
            for (system, name), (times, memories) in found.items()
            if system == "burnish" and name.startswith("LoRA")
        ]
        if pairs:
            least, name, times, memories = max(pairs)
            lines.append(
                f"burnish, {name} against the vanilla of {base}: {100 * times:.0f} % less time, {100 * memories:.0f} % "
                f"less memory; at least {100 * TARGET:.0f} % of both: {'met' if least >= TARGET else 'missed'}."
            )
    return lines


def _change(shares: list[float]) -> str:
    return f"{0.0 - 100 * median(shares):+.0f}" if shares else "-"


if __name__ == "__main__":
    sys.exit(main())
