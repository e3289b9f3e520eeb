"""What the scripts of burnish's own engine share: their flags, the engine they open, and the record they end with."""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers.work import FIRST_ORDINARY_ID, own_peak_rss_mib

from burnish.engine.native import NativeEngine
from burnish.engine.outputs import EngineStats
from burnish.kernels.cpu import library
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.memory import resident_bytes

MIB = 2**20


def arguments(description: str | None, *, model: bool = True, runs: int = 3) -> argparse.ArgumentParser:
    """The flags that all scripts share; `model` is positional where it is wanted."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        parser.add_argument("model", help="folder of the model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--kv-dtype", help="of the KV cache (default: that of the model)")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--runs", type=int, default=runs, help="measured passes, after one that warms up")
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    return parser


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(
    flags: argparse.Namespace,
    *,
    max_num_seqs: int,
    max_model_len: int,
    max_batch_tokens: int = 512,
    prefix_caching: bool = True,
    kv_cache: bool = True,
    backend: str = "auto",
) -> NativeEngine:
    """burnish's engine as the flags ask for it, without speculation."""
    # W5 alone speculates. The option is left out where this burnish has none.
    plain = {"speculation": "off"} if speculates() else {}
    return NativeEngine(
        flags.model,
        dtype=flags.dtype,
        quantize=flags.quantize,
        kv_dtype=flags.kv_dtype if kv_cache else None,
        threads=flags.threads,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        prefix_caching=prefix_caching,
        kv_cache=kv_cache,
        backend=backend,
        **plain,
    )


def speculates() -> bool:
    """Whether this burnish has the option `speculation`."""
    return "speculation" in inspect.signature(NativeEngine).parameters


def random_ids(draw: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    """So many token ids, none of them special in Llama's vocabulary."""
    return draw.integers(FIRST_ORDINARY_ID, vocab_size, size=count).tolist()


def record_of(work: str, flags: argparse.Namespace, stats: EngineStats) -> dict[str, Any]:
    """What every record begins with. The model goes by its name, so that no path of this machine is told."""
    return {
        "work": work,
        "model": Path(flags.model).name,
        "dtype": stats.dtype,
        "quantize": flags.quantize,
        "kv_dtype": flags.kv_dtype or "auto",
        "backend": stats.backend,
        "kernels": kernels(),
        "threads": flags.threads,
    }


def kernels() -> str:
    """Instruction set of the compiled kernels, or why there are none."""
    found = library.describe()
    return str(found["isa"] or f"none: {found['reason']}")


def shares(before: EngineStats, after: EngineStats, wall_s: float) -> dict[str, float | int]:
    """Where the time went between two readings: outside the backend, as a share of the steps and of the wall clock."""
    step_s, backend_s = after.step_s - before.step_s, after.backend_s - before.backend_s
    return {
        "steps": after.steps - before.steps,
        "step_s": round(step_s, 4),
        "backend_s": round(backend_s, 4),
        "overhead_of_steps": round(1 - backend_s / step_s, 5),
        "overhead_of_wall": round(1 - backend_s / wall_s, 5),
    }


def spread(values: list[float], digits: int = 1) -> str:
    """Median, and least to most where there are several."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def table(rows: list[list[str]]) -> str:
    """Aligned Markdown; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def tell(flags: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    """Print the record or what people read."""
    if flags.json:
        print(json.dumps(record), flush=True)
        return
    facts = hardware_record()
    versions = version_record()
    print(
        f"{facts['cpu']}, {facts['cores']} cores; burnish {versions['burnish']}, torch {versions['torch']}, "
        f"kernels {kernels()}\n\n{text}"
    )


@contextmanager
def memory_note(record: dict[str, Any]) -> Iterator[None]:
    """Note the process's bytes before and after a block, and its peak since it began; in MiB."""
    record["rss_before_mib"] = round(resident_bytes() / MIB, 1)
    yield
    record["rss_after_mib"] = round(resident_bytes() / MIB, 1)
    record["peak_rss_mib"] = round(own_peak_rss_mib(), 1)
