"""Quality: how far int8 and int4 are from float32, in nats per token and in right answers.

    python benchmarks/quality.py --stories STORIES260K --stories-text TEXT

KL(float32 || quantized) is over held-out text: on the bundled model and on its tuned child (see tuned.py) the task's
test questions, whose schemas neither was trained on; on stories260k (karpathy/tinyllamas, in Hugging Face form) the
text given. `decoder` computes with torch; `engine` is the native engine as it serves, compiled kernels and cache
included.
Right answers are of the tuned model over the same test questions, in float32 and quantized.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from session import arguments, percent, table, tell
from torch import Tensor
from tuned import DEFAULT, tuned_model

from burnish.compress.optimise import load_optimised
from burnish.data.bundled import bundled_path
from burnish.data.examples import make_examples
from burnish.data.rows import read_rows
from burnish.data.templates import pick_template
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.engine.step import StepInputs
from burnish.measure.compare import compare_models
from burnish.measure.evaluate import SqlScore, evaluate_sql
from burnish.pipeline.evaluate import row_prompt_tokens

KINDS = ("int8", "int4")
WINDOW = 256


def main() -> int:
    parser = arguments(__doc__, model=False)
    parser.add_argument("--tuned", type=Path, default=DEFAULT, help="folder of the tuned model; made when absent")
    parser.add_argument("--stories", type=Path, help="folder of stories260k; left out when not given")
    parser.add_argument("--stories-text", type=Path, help="held-out stories")
    parser.add_argument("--kl-rows", type=int, default=100, help="questions for KL")
    parser.add_argument("--rows", type=int, default=1000, help="questions to answer; 0 leaves them out")
    flags = parser.parse_args()
    if (flags.stories is None) != (flags.stories_text is None):
        parser.error("--stories and --stories-text go together")
    torch.set_num_threads(flags.threads)
    tuned = tuned_model(flags.tuned, threads=flags.threads)
    base = bundled_path("burnish-sql-base")
    subjects: dict[str, tuple[Path, Callable[[Tokenizer], list[Any]]]] = {
        "burnish-sql-base": (base, lambda tokenizer: _sql_texts(tokenizer, flags.kl_rows)),
        "burnish-sql-base, tuned": (tuned, lambda tokenizer: _questions(tokenizer, flags.kl_rows)),
    }
    if flags.stories is not None:
        subjects["stories260k"] = (flags.stories, lambda tokenizer: _stories(tokenizer, flags.stories_text))
    record: dict[str, Any] = {"work": "quality", "threads": flags.threads, "kl": {}, "window": WINDOW}
    for name, (folder, texts_of) in subjects.items():
        record["kl"][name] = _divergences(folder, texts_of(Tokenizer.load(folder)), flags)
    text = _kl_table(record["kl"])
    if flags.rows:
        record["answers"] = _answers(tuned, flags)
        text += "\n\n" + _answer_table(record["answers"])
    tell(flags, record, text)
    return 0


class EngineModel:
    """The native engine as a model to score: `hidden` gives the logits of its backend, and `logits` passes them on."""

    def __init__(self, engine: NativeEngine) -> None:
        self._backend = engine.runner.backend

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, V) float32: each row read as a prompt, in one step, through the cache."""
        return torch.stack([self._row(tokens.numpy()) for tokens in tokens_BT])

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def _row(self, tokens_T: np.ndarray) -> Tensor:
        count, size = len(tokens_T), self._backend.block_size
        places = np.arange(count, dtype=np.int32)
        step = StepInputs(
            tokens_T=tokens_T.astype(np.int32),
            positions_T=places,
            row_starts=np.array([0, count], dtype=np.int32),
            context_lens_S=np.array([count], dtype=np.int32),
            block_tables_SN=np.arange(-(-count // size), dtype=np.int32)[None],
            logit_rows_L=places,
            adapters_S=np.array([-1], dtype=np.int32),
            rope_lens_S=np.array([count], dtype=np.int32),
        )
        return self._backend.forward(step, greedy=False).clone()


def _divergences(folder: Path, texts: Sequence[Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Of each kind: of the decoder on torch and of the engine, both in float32 beside what is quantized."""
    float32 = load_optimised(folder, quantize="none", dtype=torch.float32, cache=False).decoder.eval()
    found: dict[str, Any] = {}
    for kind in ("none", *KINDS):
        engine = _engine(folder, kind, flags)
        children: dict[str, Any] = {f"engine ({engine.stats().backend})": EngineModel(engine)}
        if kind != "none":
            loaded = load_optimised(folder, quantize=kind, dtype=torch.float32, cache=False)
            children["decoder"] = loaded.decoder.eval()
        for where, child in children.items():
            compared = compare_models(child, float32, texts, window=WINDOW, batch_tokens=1024)
            found[f"{kind}, {where}"] = {
                key: value
                for key, value in compared.to_dict().items()
                if key in ("kl_mean", "kl_p99", "greedy_agreement", "num_tokens")
            }
    return found


def _engine(folder: Path, kind: str, flags: argparse.Namespace, *, max_num_seqs: int = 32) -> NativeEngine:
    return NativeEngine(
        folder,
        dtype="float32",
        quantize=kind,
        kv_dtype=flags.kv_dtype,
        threads=flags.threads,
        max_num_seqs=max_num_seqs,
        max_model_len=512,
        weights_cache=False,
    )


def _sql_texts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Scripts as the base has seen them, over schemas that it has not: tables, a comment, a query."""
    rows = read_rows(f"text-to-sql:test:{count}", seed=0).rows
    return [tokenizer.encode_prompt(f"{row.context}\n-- {row.instruction}\n{row.answer}\n") for row in rows]


def _questions(tokenizer: Tokenizer, count: int) -> Sequence[Any]:
    rows = read_rows(f"text-to-sql:test:{count}", seed=0)
    template = pick_template("chat", tokenizer, rows)
    return make_examples(rows.rows, tokenizer, template, max_length=WINDOW).examples


def _stories(tokenizer: Tokenizer, path: Path) -> list[list[int]]:
    ids = tokenizer.encode_prompt(path.read_text(encoding="utf-8")[:60_000])
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def _answers(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    tokenizer = Tokenizer.load(folder)
    rows = read_rows(f"text-to-sql:test:{flags.rows}", seed=0)
    template = pick_template("chat", tokenizer, rows)
    scores: dict[str, SqlScore] = {
        kind: evaluate_sql(
            _engine(folder, kind, flags),
            rows.rows,
            render=lambda row: row_prompt_tokens(row, tokenizer, template),
            max_tokens=96,
        )
        for kind in ("none", *KINDS)
    }
    dense = [answer.right for answer in scores["none"].answers]
    return {
        kind: {
            "score": score.score,
            "score_low": score.score_low,
            "score_high": score.score_high,
            "num_rows": score.num_rows,
            "drop": round(scores["none"].score - score.score, 6),
            "lost": sum(a and not b.right for a, b in zip(dense, score.answers)),
            "won": sum(b.right and not a for a, b in zip(dense, score.answers)),
        }
        for kind, score in scores.items()
    }


def _kl_table(subjects: dict[str, Any]) -> str:
    rows = [["model", "weights, computed by", "KL nats/token", "p99", "same next token", "tokens"]]
    rows += [
        [
            name,
            kind.replace("none", "float32"),
            f"{one['kl_mean']:.2g}",
            f"{one['kl_p99']:.2g}",
            percent(one["greedy_agreement"], 2),
            str(one["num_tokens"]),
        ]
        for name, kinds in subjects.items()
        for kind, one in kinds.items()
    ]
    return table(rows)


def _answer_table(answers: dict[str, Any]) -> str:
    rows = [["tuned model", "right", "95 % interval", "points lost", "questions lost and won", "of"]]
    rows += [
        [
            "float32" if kind == "none" else kind,
            percent(one["score"], 2),
            f"{percent(one['score_low'])} to {percent(one['score_high'])}",
            f"{100 * one['drop']:.2f}",
            f"{one['lost']} and {one['won']}",
            str(one["num_rows"]),
        ]
        for kind, one in answers.items()
    ]
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
