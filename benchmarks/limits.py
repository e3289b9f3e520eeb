"""What this machine can do at most: bytes read from memory per second, and multiplications of matrices per second.

    python benchmarks/limits.py

Reading: a plain sum over 1 GiB in large pages, compiled from read_rate.c (torch's sum where there is no C compiler),
the best of many passes. Matrices: oneDNN through torch, weights laid out before where that is for int8, K = 2048 and
N = 5632, eight copies in turn so that they come from memory. A better library can beat the rates of matrices; nothing
beats those of reading, but weights that stay in the caches.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from session import cores, table, tell

from burnish.models.config import ModelConfig

GEMM_ROWS = (1, 32, 512)
_K, _N, _COPIES = 2048, 5632, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--mib", type=int, default=1024, help="how much is read")
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    flags = parser.parse_args()
    read = read_rates(sorted({1, flags.threads}), mib=flags.mib, passes=flags.passes)
    gemm = gemm_rates(flags.threads, repeats=max(1, flags.passes // 6))
    record = {"work": "limits", "threads": flags.threads, "mib": flags.mib, "read": read, "gemm": gemm}
    rows = [["what", "rate"]]
    rows += [
        [f"read, {threads} thread{'s' * (threads != '1')}, GB/s", f"{rate:.1f}"]
        for threads, rate in read["gb_per_s"].items()
    ]
    for name, rates in gemm["gop_per_s"].items():
        rows += [[f"{name} matrices, {count} rows, Gop/s", f"{rate:.0f}"] for count, rate in rates.items()]
    tell(flags, record, table(rows))
    return 0


def read_rates(thread_counts: list[int], *, mib: int, passes: int) -> dict[str, Any]:
    """Best GB (10^9 bytes) per second for each number of threads, and what read them: "C" or "torch"."""
    size = mib * 2**20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data_B = torch.frombuffer(memory, dtype=torch.int64)
    data_B.fill_(1)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compiled_sum(Path(folder))
        rates = {}
        for threads in thread_counts:
            passed = _torch_pass(data_B, threads) if compiled is None else _compiled_pass(compiled, data_B, threads)
            rates[str(threads)] = round(size / min(passed() for _ in range(passes)) / 1e9, 2)
    return {"gb_per_s": rates, "read_by": "torch" if compiled is None else "C"}


def gemm_rates(threads: int, *, repeats: int) -> dict[str, Any]:
    """Best 10^9 multiplications and additions per second, by type and number of rows; types torch lacks are absent."""
    torch.set_num_threads(threads)
    makers = {"int8": _int8_linear, "bfloat16": _dense_linear(torch.bfloat16), "float32": _dense_linear(torch.float32)}
    rates: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        for rows in GEMM_ROWS:
            try:
                run = make(rows)
                with torch.inference_mode():
                    seconds = _best_time(run, repeats=repeats)
            except (RuntimeError, AttributeError, NotImplementedError):
                continue  # this torch or this processor has no such operator
            rates.setdefault(name, {})[str(rows)] = round(2 * rows * _K * _N / seconds / 1e9, 1)
    return {"gop_per_s": rates, "k": _K, "n": _N}


def batch_limit(
    config: ModelConfig, rates: dict[str, float], *, requests: int, tokens_in: int, tokens_out: int
) -> float:
    """Total tokens per second when every linear runs at the measured rates and nothing else takes any time.

    Args:
        rates: of one type in `gemm_rates`, with 32 and 512 rows.
    """
    head = config.vocab_size * config.hidden_size
    body = sum(
        _product(shape)
        for name, shape in config.parameter_shapes().items()
        if len(shape) == 2 and "embed" not in name and "lm_head" not in name
    )
    prompts_s = 2 * requests * (tokens_in * body + head) / (rates["512"] * 1e9)
    steps_s = 2 * requests * (tokens_out - 1) * (body + head) / (rates["32"] * 1e9)
    return requests * (tokens_in + tokens_out) / (prompts_s + steps_s)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1]


def _compiled_sum(folder: Path) -> Callable[[int, int], int] | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, library = Path(__file__).with_name("read_rate.c"), folder / "read_rate.so"
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    function = ctypes.CDLL(str(library)).sum_bytes
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    return function


def _compiled_pass(function: Callable[[int, int], int], data_B: torch.Tensor, threads: int) -> Callable[[], float]:
    part = data_B.nbytes // threads // 4096 * 4096
    starts = [data_B.data_ptr() + number * part for number in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def run() -> float:
        started = time.perf_counter()
        for done in [pool.submit(function, start, part) for start in starts]:
            done.result()
        return time.perf_counter() - started

    return run


def _torch_pass(data_B: torch.Tensor, threads: int) -> Callable[[], float]:
    floats_B = data_B.view(torch.float32)

    def run() -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        floats_B.sum()
        return time.perf_counter() - started

    return run


def _dense_linear(dtype: torch.dtype) -> Callable[[int], Callable[[int], object]]:
    def make(rows: int) -> Callable[[int], object]:
        weights = [torch.randn(_N, _K).to(dtype) for _ in range(_COPIES)]
        inputs_MK = torch.randn(rows, _K).to(dtype)
        return lambda turn: F.linear(inputs_MK, weights[turn % _COPIES])

    return make


def _int8_linear(rows: int) -> Callable[[int], object]:
    operators = torch.ops.onednn
    weights = [
        operators.qlinear_prepack(torch.randint(-127, 127, (_K, _N), dtype=torch.int8).t(), None)
        for _ in range(_COPIES)
    ]
    inputs_MK = torch.randint(0, 255, (rows, _K), dtype=torch.uint8)
    scales_N, zeros_N = torch.ones(_N), torch.zeros(_N, dtype=torch.int64)
    return lambda turn: operators.qlinear_pointwise(
        inputs_MK,
        1.0,
        128,
        weights[turn % _COPIES],
        scales_N,
        zeros_N,
        None,
        1.0,
        0,
        torch.bfloat16,
        "none",
        [],
        "",
    )


def _best_time(run: Callable[[int], object], *, repeats: int) -> float:
    """Least seconds of one call, over rounds of all copies."""
    run(0)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for turn in range(_COPIES):
            run(turn)
        best = min(best, (time.perf_counter() - started) / _COPIES)
    return best


if __name__ == "__main__":
    sys.exit(main())
