"""Run the systems of a list in turn, round after round, each in its own environment; print them side by side.

    python benchmarks/compare.py --config benchmarks/peers.toml --works w1,w2 --rounds 2

Writes a JSON record and, beside it, the same tables in Markdown; both are written again after every turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from peers.table import FIGURES, Result, work_table
from turns import first_missing, run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class System:
    """An entry of the list; `args` and paths as written, with their variables."""

    name: str
    script: str
    model: str
    python: str = sys.executable
    args: tuple[str, ...] = ()
    works: tuple[str, ...] = tuple(FIGURES)

    def missing(self) -> str | None:
        """What this system needs and the machine lacks: its interpreter, its model or a path in its flags."""
        return first_missing(self.python, [self.model, *(arg for arg in self.args if "$" in arg)])


def main() -> int:
    """Returns the exit status: 1 when a system that is here failed."""
    flags = _arguments()
    systems = _systems(flags.config, flags.only)
    works = flags.works.split(",")
    here = []
    for system in systems:
        missing = system.missing()
        if missing is None:
            here.append(system)
        else:
            print(f"not here: {system.name} ({missing})")
    if not here:
        raise SystemExit("none of the systems is here; see benchmarks/peers/README.md")
    relative = flags.relative or here[0].name
    if relative not in [system.name for system in here]:
        raise SystemExit(f"--relative {relative!r}: expected one of {', '.join(system.name for system in here)}")

    turns = [
        (turn, work, system)
        for turn in range(1, flags.rounds + 1)
        for work in works
        for system in here
        if work in system.works
    ]
    results: list[Result] = []
    text = ""
    failures: list[dict[str, Any]] = []
    for count, (turn, work, system) in enumerate(turns, 1):
        print(f"[{count}/{len(turns)}] round {turn}, {work}, {system.name}: ", end="", flush=True)
        started = time.perf_counter()
        found = _run(system, work, flags, config=flags.config)
        seconds = time.perf_counter() - started
        if isinstance(found, str):
            failures.append({"round": turn, "work": work, "name": system.name, "error": found.splitlines()[-1]})
            print(f"failed after {seconds:.0f} s\n{found}", flush=True)
        else:
            results.append({"round": turn, "name": system.name, **found})
            figures = (f"{figure.heading} {', '.join(map(str, found[figure.key]))}" for figure in FIGURES[work])
            print(f"{'; '.join(figures)} ({seconds:.0f} s in all)", flush=True)
        text = _write(flags, works, relative, systems=here, results=results, failures=failures)

    print(f"\n{text}\n{flags.out}\n{flags.out.with_suffix('.md')}")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    benchmarks = Path(__file__).parent
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=benchmarks / "peers.toml", help="the list of systems")
    parser.add_argument("--works", default="w1,w2")
    parser.add_argument("--rounds", type=int, default=2, help="how often every system has its turn")
    parser.add_argument("--runs", type=int, default=1, help="measured passes in each turn, after one that warms up")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--only", action="append", metavar="NAME", help="leave out all others; may be repeated")
    parser.add_argument(
        "--relative", metavar="NAME", help="the system that ratios are to (default: the first one here)"
    )
    parser.add_argument("--out", type=Path, default=benchmarks / "results" / f"{date.today()}-peers.json")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one turn may take")
    parser.add_argument("--requests", type=int, help="another size of the works, to try the adapters out")
    parser.add_argument("--output-tokens", type=int, help="the same, for the length of the answers")
    flags = parser.parse_args()
    if unknown := set(flags.works.split(",")) - set(FIGURES):
        parser.error(f"--works: there is no {', '.join(sorted(unknown))}; expected {', '.join(FIGURES)}")
    return flags


def _systems(config: Path, only: list[str] | None) -> list[System]:
    entries = tomllib.loads(config.read_text(encoding="utf-8"))["system"]
    systems = [System(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) for entry in entries]
    if only is None:
        return systems
    if unknown := set(only) - {system.name for system in systems}:
        raise SystemExit(f"{config}: no system is called {', '.join(sorted(unknown))}")
    return [system for system in systems if system.name in only]


def _run(system: System, work: str, flags: argparse.Namespace, *, config: Path) -> dict[str, Any] | str:
    """The adapter's result, or the end of what it said when it gave none."""
    options = {"--work": work, "--runs": flags.runs, "--threads": flags.threads, "--label": system.name}
    options |= {"--requests": flags.requests if work == "w1" else None, "--output-tokens": flags.output_tokens}
    command = [
        system.python,
        str(config.parent / system.script),
        system.model,
        *(str(part) for option, value in options.items() if value is not None for part in (option, value)),
        *system.args,
    ]
    return run_for_result(command, threads=flags.threads, timeout=flags.timeout)


def _write(
    flags: argparse.Namespace,
    works: list[str],
    relative: str,
    *,
    systems: list[System],
    results: list[Result],
    failures: list[dict[str, Any]],
) -> str:
    """Write the tables, and the record that they come from; returns the tables."""
    hardware = hardware_record()
    # As written in the list: with variables, so that the record names no path of this machine.
    listed = [{"name": system.name, "model": system.model, "args": system.args} for system in systems]
    record = {
        "date": str(date.today()),
        "hardware": hardware,
        "versions": {
            **version_record(),
            **{result["system"]: result["version"] for result in results if result["system"] != "burnish"},
        },
        "threads": flags.threads,
        "rounds": flags.rounds,
        "runs": flags.runs,
        "relative": relative,
        "systems": listed,
        "results": results,
        "failures": failures,
    }
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"# Systems side by side, {record['date']}",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 2**30:.0f} GiB, "
        f"{', '.join(hardware['instruction_sets'])}; {flags.threads} threads. {versions}.",
        f"{flags.rounds} rounds in turn, each of 1 warm-up and {flags.runs} measured passes: median (least to most). "
        f"Ratios are to {relative}, paired by round, above 1 where a system is better.",
    ]
    for work in works:
        sizes = next((result["work"] for result in results if result["work"]["name"] == work), None)
        if sizes is not None:
            heading = "{requests} x ({input_tokens} tokens in + {output_tokens} out)".format(**sizes)
            parts.append(f"## {work.upper()}: {heading}\n\n{work_table(work, results, relative)}")
    parts += [f"Failed in round {fail['round']}, {fail['work']}: {fail['name']}: {fail['error']}" for fail in failures]
    text = "\n\n".join(parts) + "\n"
    write_record(flags.out, record, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
