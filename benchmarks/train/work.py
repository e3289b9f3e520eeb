"""The work that every trainer does, how it is timed, and the one line that says how it went.

Imported by the runners, which run in their own environments: the standard library only. The rules are those of the
README: the same rows in the same order, all tokens learned, AdamW without weight decay at a constant rate, gradients
clipped at 1.0, rank 16 and alpha 32 on every linear of the blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLIP = 1.0
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}
HELD_OUT = 16  # the last rows are left for evaluations
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: mean per learned token, in nats; None where the trainer does not tell.
        seconds: wall time, from the rows to the cleared gradients.
        tokens: real tokens of its rows.
        positions: tokens computed, padding included.
        forward_s, backward_s, optimizer_s: parts of `seconds`; None where they are not told apart.
    """

    loss: float | None
    seconds: float
    tokens: int
    positions: int
    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None


@dataclass
class Memory:
    """Resident memory of this process, in MiB: with the model loaded, and the most since then."""

    loaded_mib: float = field(default=float("nan"))

    def mark_loaded(self) -> None:
        """Free pages are given back first. Call it when every weight, the adapter's too, has been touched."""
        gc.collect()
        _trim()
        self.loaded_mib = status_mib("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"the high-water mark of memory cannot be reset here: {error}") from error

    def peak_mib(self) -> float:
        return status_mib("VmHWM")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that all runners share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="Hugging Face folder of the model")
    parser.add_argument("rows", help="rows as rows.py writes them")
    parser.add_argument("--label", default="", help="what the result is called")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--quantize", choices=("none", "nf4", "int8"), default="none", help="the frozen base")
    parser.add_argument(
        "--precision",
        choices=("float32", "autocast", "bfloat16"),
        default="bfloat16",
        help="autocast: float32 weights, computed in bfloat16; bfloat16: frozen weights are bfloat16 too",
    )
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8, help="rows of one forward pass")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="0: keep all activations; 1: recompute blocks")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after those that warm up")
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=0, help="rows joined and cut to this length; 0: as they are")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3 for lora, 1e-4 for full")
    parser.add_argument("--adapter", help="PEFT folder of the adapter to begin with")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def learning_rate(flags: argparse.Namespace) -> float:
    return flags.learning_rate or LEARNING_RATES[flags.method]


def read_rows(flags: argparse.Namespace) -> list[list[int]]:
    """Token ids of the rows to train on, at least as many as the steps need (begun again where they end)."""
    rows = [json.loads(line)["input_ids"] for line in Path(flags.rows).read_text(encoding="utf-8").splitlines()]
    rows = rows[:-HELD_OUT] if len(rows) > 2 * HELD_OUT else rows
    if flags.sequence:
        rows = cut_to(rows, flags.sequence)
    needed = (flags.warmup_steps + flags.steps) * flags.rows_per_step
    if not rows:
        raise SystemExit(f"{flags.rows} has no rows of {flags.sequence} tokens")
    return (rows * -(-needed // len(rows)))[:needed] if needed else rows


def cut_to(rows: list[list[int]], length: int) -> list[list[int]]:
    """Rows joined end to end and cut into pieces of exactly `length`; what is left over is dropped."""
    stream = [token for row in rows for token in row]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def rows_of_step(rows: list[list[int]], step: int, rows_per_step: int) -> list[list[int]]:
    """Rows of one step, counted from 0."""
    return rows[step * rows_per_step : (step + 1) * rows_per_step]


def summary(steps: list[Step], *, warmup_steps: int) -> dict[str, Any]:
    """Figures of the steps after those that warmed up; losses of all."""
    measured = steps[warmup_steps:]
    seconds = sum(step.seconds for step in measured)
    tokens = sum(step.tokens for step in measured)
    return {
        "tokens_per_s": round(tokens / seconds, 2) if seconds else 0.0,
        "s_per_step": round(seconds / max(1, len(measured)), 4),
        "tokens_per_step": round(tokens / max(1, len(measured))),
        "real_share": round(tokens / max(1, sum(step.positions for step in measured)), 4),
        **{f"{part}_share": _share(measured, part, seconds) for part in ("forward", "backward", "optimizer")},
        "step_s": [round(step.seconds, 4) for step in steps],
        "step_tokens": [step.tokens for step in steps],
        "losses": [None if step.loss is None else round(step.loss, 6) for step in steps],
    }


def report(
    flags: argparse.Namespace,
    steps: list[Step],
    memory: Memory,
    *,
    system: str,
    versions: dict[str, str],
    settings: dict[str, Any],
    trained: int,
    load_s: float,
) -> None:
    """Print how it went as one line: RESULT, then JSON.

    Args:
        settings: what the runner chose besides its flags.
        trained: trainable numbers.
    """
    peak = memory.peak_mib()
    result = {
        "label": flags.label or system,
        "system": system,
        "versions": versions,
        "settings": {
            "method": flags.method,
            "quantize": flags.quantize,
            "precision": flags.precision,
            "micro": flags.micro,
            "rows_per_step": flags.rows_per_step,
            "checkpoint_every": flags.checkpoint_every,
            "sequence": flags.sequence,
            "learning_rate": learning_rate(flags),
            **settings,
        },
        "threads": flags.threads,
        "warmup_steps": flags.warmup_steps,
        "steps": flags.steps,
        "trained": trained,
        **summary(steps, warmup_steps=flags.warmup_steps),
        "loaded_mib": round(memory.loaded_mib, 1),
        "peak_mib": round(peak, 1),
        "increase_mib": round(peak - memory.loaded_mib, 1),
        "load_s": round(load_s, 2),
    }
    print("RESULT " + json.dumps(result), flush=True)


def status_mib(key: str) -> float:
    """VmRSS or VmHWM of this process, in MiB (Linux)."""
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else float("nan")


def _share(steps: list[Step], part: str, seconds: float) -> float | None:
    values = [getattr(step, f"{part}_s") for step in steps]
    if not values or None in values:
        return None
    return round(sum(values) / seconds, 4)


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
    if trim is not None:
        trim(0)
