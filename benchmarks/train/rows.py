"""Tokenise rows of instructions once, so that every trainer reads the same tokens in the same order.

    python benchmarks/train/rows.py alpaca.json ~/models/135m rows.jsonl

The file is JSON: a list of {"instruction", "input", "output"}. Rows are put into Alpaca's template, shuffled with seed
0, begin and end with the tokenizer's tokens for that, and are cut at 512 tokens. Each line of the result is
{"input_ids": [...], "n_prompt": k}, where k tokens belong to the prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.data.tokenizer import Tokenizer

# The prompts of Stanford Alpaca (Taori et al., 2023).
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON list of rows with instruction, input and output")
    parser.add_argument("model", type=Path, help="folder of the model (or of its tokenizer)")
    parser.add_argument("out", type=Path, help="file for the rows, one JSON object a line")
    parser.add_argument("--max-length", type=int, default=512)
    flags = parser.parse_args()
    rows = json.loads(flags.data.read_text(encoding="utf-8"))
    made = list(tokenised(rows, Tokenizer.load(flags.model), max_length=flags.max_length))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    print(json.dumps(statistics([len(row["input_ids"]) for row in made], max_length=flags.max_length)))
    return 0


def tokenised(rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer, *, max_length: int) -> Iterator[dict[str, Any]]:
    """The rows, shuffled with seed 0; the end token is learned like any other, and cut off from rows too long."""
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise SystemExit("the tokenizer names no begin or no end token")
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    for row in shuffled:
        template = WITH_INPUT if row.get("input") else WITHOUT_INPUT
        prompt = [tokenizer.bos_id, *tokenizer.encode(template.format(**row))]
        tokens = [*prompt, *tokenizer.encode(row["output"]), tokenizer.eos_id]
        yield {"input_ids": tokens[:max_length], "n_prompt": min(len(prompt), max_length)}


def statistics(lengths: Sequence[int], *, max_length: int) -> dict[str, float]:
    """Lengths, and how much of a padded batch of 8 is real: padded to its longest row, and to `max_length`."""
    ordered = sorted(lengths)
    batches = [lengths[start : start + BATCH] for start in range(0, len(lengths) - BATCH + 1, BATCH)]
    real = sum(map(sum, batches))
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "mean": round(sum(lengths) / len(lengths), 1),
        "median": ordered[len(ordered) // 2],
        "p90": ordered[len(ordered) * 9 // 10],
        "max": ordered[-1],
        "real_share_longest": round(real / max(1, sum(BATCH * max(batch) for batch in batches)), 3),
        "real_share_max_length": round(real / max(1, BATCH * max_length * len(batches)), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
