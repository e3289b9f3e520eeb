"""What every quantizer of the comparison is given, and the one line that says how it went.

Imported by runners in environments of their own: the standard library only. The rows are those of benchmarks/train,
joined end to end and cut into samples of one length.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="Hugging Face folder of the dense model")
    parser.add_argument("rows", help="token ids, as benchmarks/train/rows.py writes them")
    parser.add_argument("out", type=Path, help="folder for the quantized model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of each sample")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def samples_of(flags: argparse.Namespace) -> list[list[int]]:
    """Calibration samples, each of exactly the length asked for."""
    lines = Path(flags.rows).read_text(encoding="utf-8").splitlines()
    stream = [token for line in lines for token in json.loads(line)["input_ids"]]
    if len(stream) < flags.samples * flags.length:
        raise SystemExit(f"{flags.rows} has {len(stream)} tokens, {flags.samples * flags.length} are asked for")
    return [stream[number * flags.length :][: flags.length] for number in range(flags.samples)]


def measured(flags: argparse.Namespace, quantize: Callable[[], None], *, system: str, versions: dict[str, str]) -> None:
    """Run `quantize`, with the model loaded already, and print RESULT and JSON.

    wall_s is what a clock shows, cpu_s what all threads computed (user and system); increase_mib is the most that the
    process held meanwhile over what it held before (Linux).
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
    if trim is not None:
        trim(0)
    loaded = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, started = _cpu_s(), time.perf_counter()
    quantize()
    wall, cpu = time.perf_counter() - started, _cpu_s() - before
    result: dict[str, Any] = {
        "system": system,
        "versions": versions,
        "samples": flags.samples,
        "length": flags.length,
        "bits": flags.bits,
        "group_size": flags.group_size,
        "threads": flags.threads,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "loaded_mib": round(loaded, 1),
        "increase_mib": round(_status_mib("VmHWM") - loaded, 1),
    }
    print("RESULT " + json.dumps(result), flush=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status_mib(key: str) -> float:
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else float("nan")
