"""Every way to make a model smaller, made and measured: time, memory, size, speed, quality; and peers on stories260k.

    python benchmarks/compress/study.py                             # what is here and was not measured yet
    python benchmarks/compress/study.py --works sql --only "GPTQ 4-bit" --again
    python benchmarks/compress/study.py --measure speed --again     # speeds alone, once more, on an idle machine
    python benchmarks/compress/study.py --peers only              # stories260k: burnish, llm-compressor, GPTQModel, ...
    python benchmarks/compress/study.py --draw                      # tables and plots from the record

What is measured stays measured: the record is written after every step, and a run that was stopped goes on. What is
missing (an interpreter, a module, a model) is named with its reason. Children stay in --work-folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tables import report_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turns import first_missing, run_for_result, write_record

from burnish.measure.hardware import hardware_record, version_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PARENT = "parent"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model, and what is measured of its children."""

    name: str
    title: str
    model: str
    measure: tuple[str, ...]

    @property
    def folder(self) -> str:
        return os.path.expandvars(self.model)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to make a child, as written in the list."""

    name: str
    family: str
    make: tuple[str, ...] = ()
    works: tuple[str, ...] = ("sql",)
    engine: str = "native"
    modules: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program on stories260k."""

    name: str
    script: str
    python: str = sys.executable


def main() -> int:
    """Returns the exit status: 1 when something that is here failed."""
    flags = _arguments()
    works, variants, peers = read_list(flags.config)
    record = _record(flags.out)
    failed = 0
    if not flags.draw:
        for work in works:
            if flags.peers == "only" or (flags.works and work.name not in flags.works):
                continue
            for variant in variants:
                if work.name in variant.works and (not flags.only or variant.name in flags.only):
                    failed += not _step(record, work, variant, flags)
        if flags.peers != "none":
            failed += sum(not _peer(record, peer, flags) for peer in peers)
    _write(record, flags)
    print(f"\n{report_of(record)}\n{flags.out}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "study.toml")
    parser.add_argument("--works", action="append", help="only this work; may be given again")
    parser.add_argument("--only", action="append", metavar="VARIANT", help="only this variant; may be given again")
    parser.add_argument("--measure", default="quality,speed", help="of quality and speed")
    parser.add_argument("--peers", default="none", choices=("none", "only", "too"), help="programs on stories260k")
    parser.add_argument("--again", action="store_true", help="measure what was measured already; children are kept")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--stories", default="${COMPRESS_STUDY}/stories260k", help="the model's folder")
    parser.add_argument("--text", default="${COMPRESS_STUDY}/tinystories.txt", help="calibrates and measures it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one step may take")
    parser.add_argument("--work-folder", type=Path, default=Path("compress-study"), help="for children")
    parser.add_argument("--draw", action="store_true", help="only write the tables and plots again")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / f"{date.today()}-compress-study.json")
    return parser.parse_args()


def read_list(path: Path) -> tuple[list[Work], list[Variant], list[Peer]]:
    """The works, variants and peers of a list."""
    with path.open("rb") as file:
        record = tomllib.load(file)

    def fixed(item: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}

    works = [Work(**fixed(item)) for item in record["work"]]
    variants = [Variant(**fixed(item)) for item in record["variant"]]
    return works, variants, [Peer(**item) for item in record["peer"]]


def _record(out: Path) -> dict[str, Any]:
    if out.is_file():
        return json.loads(out.read_text(encoding="utf-8"))
    return {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "variants": [],
        "peers": [],
    }


def _write(record: dict[str, Any], flags: argparse.Namespace) -> None:
    write_record(flags.out, record, report_of(record))
    from draw import draw  # matplotlib is slow to import

    draw(record, flags.out.with_suffix(""))


def _step(record: dict[str, Any], work: Work, variant: Variant, flags: argparse.Namespace) -> bool:
    """Make and measure one variant of one work; False when that failed."""
    entry = next((e for e in record["variants"] if (e["work"], e["name"]) == (work.name, variant.name)), None)
    if entry is None:
        entry = {"work": work.name, "name": variant.name, "family": variant.family}
        record["variants"].append(entry)
    wanted = [what for what in work.measure if what in flags.measure.split(",") and variant.engine != "none"]
    missing = [what for what in wanted if flags.again or what not in entry]
    if "made" in entry and not missing:
        return True
    reason = _why_not(work, variant)
    if reason is None:
        print(f"{work.name}: {variant.name}", flush=True)
        reason = _made(entry, work, variant, flags)
    for what in missing if reason is None else []:
        reason = reason or _measured(entry, work, variant, what, flags)
    entry["reason"] = reason
    if reason is not None:
        print(f"{work.name}: {variant.name}: {reason}", flush=True)
    write_record(flags.out, record, report_of(record))
    return reason is None or reason.startswith("left out")


def _why_not(work: Work, variant: Variant) -> str | None:
    if not Path(work.folder).is_dir():
        return f"left out: there is no {work.model}"
    absent = [module for module in variant.modules if find_spec(module) is None]
    return f"left out: {', '.join(absent)} is not installed" if absent else None


def _child(work: Work, variant: Variant, flags: argparse.Namespace) -> Path:
    if not variant.make:
        return Path(work.folder)
    name = f"{variant.slug}.gguf" if "gguf" in variant.make else variant.slug
    return flags.work_folder / work.name / name


def _made(entry: dict[str, Any], work: Work, variant: Variant, flags: argparse.Namespace) -> str | None:
    """Make the child unless it is there; a gate that fails is a result. Why it could not be made, or None."""
    child = _child(work, variant, flags)
    is_file = child.suffix == ".gguf"
    manifest = child.with_name(f"{child.name}.burnish.json") if is_file else child / "burnish.json"
    if variant.make and not ("made" in entry and manifest.is_file()):
        if child.is_dir():
            shutil.rmtree(child)
        child.parent.mkdir(parents=True, exist_ok=True)
        command, *options = variant.make
        if command != "export":
            options += ["--gate-rows", "0", "--samples", str(flags.samples)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "burnish.cli.main", command, work.folder, "--out", str(child), "--overwrite"),
                *(*options, "--threads", str(flags.threads), "--quiet", "--json"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(flags.threads)},
            capture_output=True,
            text=True,
            timeout=flags.timeout,
            check=False,
        )
        if done.returncode not in (0, 4):
            return (done.stderr or done.stdout).strip()[-400:] or f"ended with {done.returncode}"
        figures = json.loads(manifest.read_text(encoding="utf-8"))["figures"]
        gate = figures.get("gate") or {}
        names = ("seconds", "peak_memory_bytes", "bits_per_weight", "calibration_tokens", "parameters", "sparsity")
        entry["made"] = {name: figures[name] for name in names if figures.get(name) is not None}
        entry["made"] |= {"command": list(variant.make), "gate": gate.get("verdict"), "gate_kl": gate.get("kl_mean")}
    entry.setdefault("made", {})
    weights = (".safetensors", ".bin", ".gguf")
    files = [child] if is_file else [file for file in child.iterdir() if file.suffix in weights]
    entry["disk_bytes"] = sum(file.stat().st_size for file in files)
    return None


def _measured(entry: dict[str, Any], work: Work, variant: Variant, what: str, flags: argparse.Namespace) -> str | None:
    answers = flags.work_folder / f"{work.name}-answers.json"
    answers.parent.mkdir(parents=True, exist_ok=True)
    if what == "quality" and variant.name != PARENT and not answers.is_file():
        return f"the parent of {work.name} was not measured yet"
    found = run_for_result(
        [
            *(sys.executable, str(HERE / "measure.py"), str(_child(work, variant, flags)), "--parent", work.folder),
            *("--answers", str(answers), "--engine", variant.engine, "--what", what),
            *("--threads", str(flags.threads)),
        ],
        threads=flags.threads,
        timeout=flags.timeout,
    )
    if isinstance(found, str):
        return found[-400:]
    entry[what] = found.pop(what)
    # Loading is timed, and memory read, with the speeds where they are measured: fewer requests run at once there.
    if what == "speed" or "load_seconds" not in entry:
        entry |= {name: found[name] for name in ("load_seconds", "load_memory_bytes", "inference_memory_bytes")}
    if what == "speed":
        entry["load_average"] = os.getloadavg()[0]
    return None


def _peer(record: dict[str, Any], peer: Peer, flags: argparse.Namespace) -> bool:
    """Run one program on stories260k; False when it gave nothing though it is here."""
    done = next((entry for entry in record["peers"] if entry["name"] == peer.name), None)
    if done is not None and done.get("rows") and not flags.again:
        return True
    absent = first_missing(peer.python, [flags.stories, flags.text])
    entry: dict[str, Any] = {"name": peer.name}
    if absent is not None:
        entry["reason"] = f"left out: there is no {absent}"
    else:
        print(f"stories260k: {peer.name}", flush=True)
        found = run_for_result(
            [
                peer.python,
                str(HERE / "peers" / peer.script),
                flags.stories,
                flags.text,
                "--threads",
                str(flags.threads),
            ],
            threads=flags.threads,
            timeout=flags.timeout,
        )
        entry |= {"reason": found[-400:]} if isinstance(found, str) else {"rows": found["rows"]}
    record["peers"] = [other for other in record["peers"] if other["name"] != peer.name] + [entry]
    if entry.get("reason"):
        print(f"stories260k: {peer.name}: {entry['reason']}", flush=True)
    write_record(flags.out, record, report_of(record))
    return "rows" in entry or absent is not None


if __name__ == "__main__":
    sys.exit(main())
