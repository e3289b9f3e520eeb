"""The text that stories260k is calibrated on and the text that it is measured on. Needs torch and tokenizers alone.

The text is cut into rows of a begin token and 255 tokens. The first 64 rows calibrate; the second half of all rows
measures; nothing is in both, and no setting was chosen by the second half.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CALIBRATION_ROWS = 64
ROW_TOKENS = 256
BEGIN = 1

Logits = Callable[[torch.Tensor], torch.Tensor]


def arguments(description: str) -> argparse.Namespace:
    """Flags of every runner: the model's folder, the text, and which bits."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--threads", type=int, default=2)
    flags = parser.parse_args()
    flags.bits = [int(bits) for bits in flags.bits.split(",")]
    torch.set_num_threads(flags.threads)
    return flags


def calibration_and_evaluation(model: Path, text: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows, (64, 256) to calibrate on and (R, 256) to measure on."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = tokenizer.encode(text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
    count = len(tokens) // (ROW_TOKENS - 1)
    rows = torch.tensor(tokens[: count * (ROW_TOKENS - 1)]).view(count, ROW_TOKENS - 1)
    rows = torch.cat([torch.full((count, 1), BEGIN), rows], dim=1)
    if count // 2 < CALIBRATION_ROWS:
        raise SystemExit(f"the text has {count} rows; {2 * CALIBRATION_ROWS} are needed to keep the halves apart")
    return rows[:CALIBRATION_ROWS], rows[count // 2 :]


@torch.no_grad()
def quality(child: Logits, parent: Logits, rows: torch.Tensor) -> dict[str, float]:
    """Perplexity of both, mean and 99th percentile of KL(parent || child) in nats per token, and greedy agreement."""
    nll = parent_nll = agreed = 0.0
    divergences = []
    for tokens in rows.split(32):
        theirs, ours = (model(tokens)[:, :-1].float().log_softmax(-1) for model in (parent, child))
        targets = tokens[:, 1:, None]
        nll -= ours.gather(-1, targets).double().sum().item()
        parent_nll -= theirs.gather(-1, targets).double().sum().item()
        agreed += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1).flatten())
    divergence = torch.cat(divergences)
    count = len(divergence)
    if not math.isfinite(nll) or not divergence.isfinite().all():
        raise ArithmeticError("its logits are not finite numbers")
    return {
        "perplexity": math.exp(min(nll / count, 700.0)),
        "perplexity_parent": math.exp(parent_nll / count),
        "kl_mean": divergence.mean().item(),
        "kl_p99": divergence.quantile(0.99).item(),
        "greedy_agreement": agreed / count,
        "eval_tokens": count,
    }


def report(
    tool: str, settings: dict[str, Callable[[], tuple[Logits, dict[str, Any]]]], parent: Logits, rows: torch.Tensor
) -> None:
    """Make each child, measure it, and print the line that the study reads; one that fails says why and is left out.

    Args:
        settings: name -> a function that gives the child and what to tell about it (bits, bits_per_weight, ...).
    """
    found = []
    for name, make in settings.items():
        started = time.perf_counter()
        try:
            child, facts = make()
            seconds = time.perf_counter() - started
            found.append({"tool": tool, "name": name, **facts, "seconds": seconds, **quality(child, parent, rows)})
            print(f"{tool} {name}: {found[-1]['perplexity']:.4f}", file=sys.stderr, flush=True)
        except Exception as error:  # a peer's refusal is a result
            text = " ".join(str(error).split())[:300]
            found.append({"tool": tool, "name": name, "error": f"{type(error).__name__}: {text}"})
            print(f"{tool} {name}: {found[-1]['error']}", file=sys.stderr, flush=True)
    print("RESULT " + json.dumps({"rows": found}), flush=True)
