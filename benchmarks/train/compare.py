"""burnish's training beside its peers: the settings of a list in turn, round after round, each in its own environment.

    python benchmarks/train/compare.py                                          # all of settings.toml that is here
    python benchmarks/train/compare.py --works 135m --groups LoRA --rounds 3
    python benchmarks/train/compare.py --only "burnish LoRA bf16" --only "PEFT LoRA all bf16, micro 1" --steps 50
    python benchmarks/train/compare.py --rounds 1 --steps 1 --warmup-steps 1 --out /tmp/try.json   # does it run at all

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

from table import group_table  # also puts the folder above on the path
from turns import first_missing, run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained on what, as written in the list; `args` go to every runner."""

    name: str
    title: str
    model: str
    rows: str
    steps: int
    warmup_steps: int
    args: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to do it, as written in the list."""

    name: str
    group: str
    script: str
    peer: bool
    python: str = sys.executable
    args: tuple[str, ...] = ()
    works: tuple[str, ...] = ("135m",)


def main() -> int:
    """Returns the exit status: 1 when a setting that is here failed."""
    flags = _arguments()
    works, settings = read_list(flags.config)
    works = _chosen(works, flags.works.split(",") if flags.works else None, "--works")
    settings = _chosen(settings, flags.only, "--only")
    if flags.groups:
        if unknown := set(flags.groups) - {setting.group for setting in settings}:
            raise SystemExit(f"--groups: there is no {', '.join(sorted(unknown))}")
        settings = [setting for setting in settings if setting.group in flags.groups]
    here = _here(works, settings)
    turns = [(turn, work, setting) for turn in range(1, flags.rounds + 1) for work, setting in here]
    if not turns:
        raise SystemExit("nothing of this is here; see benchmarks/train/README.md")
    record: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "threads": flags.threads,
        "rounds": flags.rounds,
        "works": {work.name: work.title for work in works},
        "results": [],
        "failures": [],
    }
    text = ""
    for count, (turn, work, setting) in enumerate(turns, 1):
        print(f"[{count}/{len(turns)}] round {turn}, {work.name}, {setting.name}: ", end="", flush=True)
        load, started = os.getloadavg()[0], time.perf_counter()
        found = run_for_result(_command(work, setting, flags), threads=flags.threads, timeout=flags.timeout)
        seconds = time.perf_counter() - started
        place = {"round": turn, "work": work.name, "group": setting.group, "name": setting.name, "peer": setting.peer}
        if isinstance(found, str):
            record["failures"].append({**place, "error": found.splitlines()[-1]})
            print(f"failed after {seconds:.0f} s\n{found}", flush=True)
        else:
            # The load before it began: others who computed meanwhile spoil the figures.
            record["results"].append({**place, "load_average": round(load, 2), **found})
            memory = f"{found['increase_mib']:.0f} MiB over {found['loaded_mib']:.0f}"
            figures = f"{found['tokens_per_s']:.0f} tokens/s, {memory}, last loss {found['losses'][-1]}"
            print(f"{figures} ({seconds:.0f} s in all)", flush=True)
        text = report_of(record)
        write_record(flags.out, record, text)
    print(f"\n{text}\n{flags.out}\n{flags.out.with_suffix('.md')}")
    return 1 if record["failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "settings.toml", help="the list of works and settings")
    parser.add_argument("--works", help="names joined by commas (default: all)")
    parser.add_argument("--groups", action="append", metavar="GROUP", help="leave out all others; may be repeated")
    parser.add_argument("--only", action="append", metavar="NAME", help="leave out all others; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="how often every setting has its turn")
    parser.add_argument("--steps", type=int, help="measured steps, instead of the work's own")
    parser.add_argument("--warmup-steps", type=int, help="steps before them, instead of the work's own")
    parser.add_argument("--threads", type=int, default=_cores())
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one turn may take")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-train-peers.json")
    return parser.parse_args()


def read_list(config: Path) -> tuple[list[Work], list[Setting]]:
    """The works and settings of a list, in its order."""
    listed = tomllib.loads(config.read_text(encoding="utf-8"))
    works = [Work(**_with_tuples(entry)) for entry in listed["work"]]
    settings = [Setting(**_with_tuples(entry)) for entry in listed["setting"]]
    known = {work.name for work in works}
    for setting in settings:
        if unknown := set(setting.works) - known:
            raise SystemExit(f"{config}: {setting.name} is for {', '.join(sorted(unknown))}, which is no work")
    return works, settings


def report_of(record: dict[str, Any]) -> str:
    """The record's tables in Markdown, one for every work and group that has results."""
    facts, results = record["hardware"], record["results"]
    versions = dict(record["versions"])
    for result in results:
        versions |= {name: text for name, text in result["versions"].items() if name not in versions}
    loads = [result["load_average"] for result in results]
    parts = [
        f"# Training beside its peers, {record['date']}",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"{', '.join(facts['instruction_sets'])}; {record['threads']} threads. "
        f"{', '.join(f'{name} {text}' for name, text in versions.items())}. Load average before each turn: "
        f"{min(loads, default=0)} to {max(loads, default=0)}.",
        f"{record['rounds']} rounds in turn: median (least to most). tokens/s counts real tokens, not padding. Memory "
        "is the most the process held while training, over what it held with the model loaded. Ratios are to the "
        "fastest peer of the table (in bold), paired by round. A star: rows in the trainer's own order. plan: memory "
        "of loading and training as `burnish plan` predicts it, over what was measured.",
    ]
    for work, title in record["works"].items():
        mine = [result for result in results if result["work"] == work]
        for group in dict.fromkeys(result["group"] for result in mine):
            table = group_table([result for result in mine if result["group"] == group])
            parts.append(f"## {title}: {group}\n\n{table}")
    parts += [
        f"Failed in round {fail['round']}, {fail['work']}: {fail['name']}: {fail['error']}"
        for fail in record["failures"]
    ]
    return "\n\n".join(parts) + "\n"


def _chosen(entries: list[Any], names: list[str] | None, option: str) -> list[Any]:
    if names is None:
        return entries
    if unknown := set(names) - {entry.name for entry in entries}:
        raise SystemExit(f"{option}: there is no {', '.join(sorted(unknown))}")
    return [entry for entry in entries if entry.name in names]


def _here(works: list[Work], settings: list[Setting]) -> list[tuple[Work, Setting]]:
    """Pairs that this machine has everything for; says what the others lack."""
    found = []
    for work in works:
        for setting in settings:
            if work.name not in setting.works:
                continue
            missing = first_missing(setting.python, [work.model, work.rows])
            if missing is None:
                found.append((work, setting))
            else:
                print(f"not here: {setting.name}, {work.name} ({missing})")
    return found


def _command(work: Work, setting: Setting, flags: argparse.Namespace) -> list[str]:
    steps = work.steps if flags.steps is None else flags.steps
    warmup_steps = work.warmup_steps if flags.warmup_steps is None else flags.warmup_steps
    # The work's flags last: where it says how many rows a micro-batch has, that holds.
    return [
        *(setting.python, str(HERE / setting.script), work.model, work.rows, "--label", setting.name),
        *("--steps", str(steps), "--warmup-steps", str(warmup_steps), "--threads", str(flags.threads)),
        *setting.args,
        *work.args,
    ]


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
