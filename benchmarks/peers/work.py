"""The works that every system does, how they are timed, and the one line that says how it went.

Imported by the adapters, which run in their own environments: numpy and the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 32000
FIRST_ORDINARY_ID = 3  # ids below are <unk>, <s> and </s> in Llama's vocabulary


@dataclass(frozen=True)
class Work:
    """Requests that arrive at once; greedy decoding, end tokens passed over."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int

    def prompts(self, seed: int) -> np.ndarray:
        """Random ids, different for each request: int64 [requests, input_tokens]."""
        ids = np.random.default_rng(seed)
        return ids.integers(FIRST_ORDINARY_ID, VOCABULARY, size=(self.requests, self.input_tokens), dtype=np.int64)


WORKS = {
    "w1": Work("w1", requests=32, input_tokens=128, output_tokens=128),
    "w2": Work("w2", requests=1, input_tokens=128, output_tokens=128),
}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over a work.

    Attributes:
        wall_s: from handing the prompts over to having the last token.
        ttft_s: to the first token; only for a single request.
        tokens: ids produced, one list a request; None where the system does not tell.
    """

    wall_s: float
    ttft_s: float | None = None
    tokens: list[list[int]] | None = None


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that all adapters share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="folder or file of the model, in the system's own format")
    parser.add_argument("--work", choices=sorted(WORKS), required=True)
    parser.add_argument("--runs", type=int, default=1, help="measured passes, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--label", default="", help="what the result is called")
    parser.add_argument("--requests", type=int, help="another number of requests, to try an adapter out")
    parser.add_argument("--output-tokens", type=int, help="another length of the answers, to try an adapter out")
    return parser


def chosen_work(flags: argparse.Namespace) -> Work:
    """The work that the flags name, with the sizes they change."""
    work = WORKS[flags.work]
    requests = flags.requests or work.requests
    return Work(work.name, requests, work.input_tokens, flags.output_tokens or work.output_tokens)


def timed_load(load: Callable[[], Any]) -> tuple[Any, float]:
    """What `load` returns, and its seconds."""
    started = time.perf_counter()
    loaded = load()
    return loaded, time.perf_counter() - started


def measure(run: Callable[[np.ndarray], Pass], work: Work, runs: int) -> list[Pass]:
    """One pass to warm up, then `runs` more; each has prompts of its own, so that no cache of prompts helps.

    Raises:
        SystemExit: a pass produced another number of tokens than the work asks for.
    """
    passes = []
    for seed in range(runs + 1):
        done = run(work.prompts(seed))
        if done.tokens is not None and [len(ids) for ids in done.tokens] != [work.output_tokens] * work.requests:
            raise SystemExit(f"wrong lengths of answers: {[len(ids) for ids in done.tokens]}")
        passes.append(done)
    return passes


def report(
    flags: argparse.Namespace,
    work: Work,
    passes: list[Pass],
    *,
    system: str,
    version: str,
    settings: dict[str, Any],
    load_s: float | None = None,
    peak_rss_mib: float | None = None,
) -> None:
    """Print the result of `measure` as one line: RESULT, then JSON."""
    warm_up, *measured = passes
    result = {
        "label": flags.label or system,
        "system": system,
        "version": version,
        "work": asdict(work),
        "threads": flags.threads,
        "settings": settings,
        "warm_up_s": round(warm_up.wall_s, 3),
        "walls_s": [round(done.wall_s, 4) for done in measured],
        "total_tokens_per_s": [
            round(work.requests * (work.input_tokens + work.output_tokens) / done.wall_s, 2) for done in measured
        ],
        **_single_request_figures(work, measured),
        "first_tokens": [ids[0] for ids in warm_up.tokens] if warm_up.tokens else None,
        "load_s": None if load_s is None else round(load_s, 2),
        "peak_rss_mib": round(own_peak_rss_mib() if peak_rss_mib is None else peak_rss_mib, 1),
        "model_mib": round(_size_mib(Path(flags.model)), 1),
    }
    print("RESULT " + json.dumps(result), flush=True)


def own_peak_rss_mib() -> float:
    """Most resident memory this process has had, in MiB (VmHWM of Linux)."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else float("nan")


def _single_request_figures(work: Work, measured: list[Pass]) -> dict[str, list[float]]:
    if work.requests != 1:
        return {}
    timed = [(done.wall_s, done.ttft_s) for done in measured if done.ttft_s is not None]
    return {
        "ttft_ms": [round(ttft * 1e3, 2) for _, ttft in timed],
        "decode_tokens_per_s": [round((work.output_tokens - 1) / (wall - ttft), 3) for wall, ttft in timed],
    }


def _size_mib(model: Path) -> float:
    files = [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
    return sum(os.path.getsize(path) for path in files) / 2**20
