"""Train the bundled base model from scratch on `corpus`, with a fixed seed, on two CPU cores in about an hour.

    python training/base_model/make_tokenizer.py
    python training/base_model/train.py

Writes the model into the package and a log of its figures beside this script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from burnish.data.text_to_sql.domains import VALIDATION_WORDS, VALIDATION_WORLDS
from burnish.data.text_to_sql.queries import draw_draft
from burnish.data.text_to_sql.schema import WordLists, draw_database, parse_worlds
from burnish.models.attention import AttentionSpec
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from corpus import documents

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "src/burnish/data/assets/burnish-sql-base"
CONFIG = ModelConfig(
    family="llama",
    vocab_size=3072,
    hidden_size=256,
    intermediate_size=768,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=64,
    max_position_embeddings=1024,
    norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    eos_ids=(5,),
)
IGNORED = -100  # labels that do not count
QUESTIONS_FROM = 1750  # batches of scripts and prose before lists of questions join them
QUESTION_SHARE = 0.2
WIDE_FROM = 3000  # batches before the vocabulary of names widens
SECOND_CYCLE = 5000  # batches before the rate rises once more, and two tables become as frequent as one
STEPS = 6200
STEP = 48  # document lengths are filled up to a multiple of this


def batches(tokenizer: Tokenizer, *, tokens: int, seed: int) -> Iterator[Tensor]:
    """(rows, length) token ids, about `tokens` in all: one document a row, end-of-text after it.

    Rows are filled up with `IGNORED` to a multiple of `STEP`: documents of like length go together, and few shapes
    occur, which keeps kernels warm. Lists of questions come in after `QUESTIONS_FROM` batches, once the rest has begun
    to make sense, and the names become harder after `WIDE_FROM`.
    """
    end = tokenizer.token_to_id("<|endoftext|>")
    source = documents(seed)
    waiting: dict[int, list[list[int]]] = {}
    count = 0
    while True:
        texts = [next(source) for _ in range(256)]
        for encoding in tokenizer.encode_batch_fast(texts):
            row = [*encoding.ids, end]
            length = 1 + -(-(len(row) - 1) // STEP) * STEP
            bucket = waiting.setdefault(length, [])
            bucket.append(row + [IGNORED] * (length - len(row)))
            if len(bucket) == max(1, tokens // length):
                yield torch.tensor(bucket)
                bucket.clear()
                count += 1
                if count == QUESTIONS_FROM:
                    source = documents(seed, question_share=QUESTION_SHARE)
                if count == WIDE_FROM:
                    source = documents(seed, question_share=QUESTION_SHARE, wide=True)
                if count == SECOND_CYCLE:
                    source = documents(seed + 1, question_share=QUESTION_SHARE, wide=True, two_tables=0.5)


def commented_queries(tokenizer: Tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
    """Schema with a comment, and the query that follows, over the task's validation worlds: what the base can do."""
    rng = random.Random("burnish-base/probe")
    worlds, words = parse_worlds(VALIDATION_WORLDS), WordLists(VALIDATION_WORDS)
    pairs = []
    for _ in range(count):
        database = draw_database(rng.choice(worlds), num_tables=rng.choice((1, 1, 2)), words=words, rng=rng)
        draft = draw_draft(database, rng)
        head, tail = f"{database.schema}\n\n-- {draft.phrase}\n", f"{draft.sql};"
        pairs.append((tokenizer.encode(head).ids, tokenizer.encode(tail).ids))
    return pairs


@torch.no_grad()
def probe(model: Decoder, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Share of queries of which every token is the model's first choice."""
    model.eval()
    right = 0
    for head, tail in pairs:
        tokens = torch.tensor([head + tail])
        choices = model(tokens)[0, len(head) - 1 : -1].argmax(-1)
        right += bool((choices == tokens[0, len(head) :]).all())
    model.train()
    return right / len(pairs)


class MaterialisedCausal:
    """Causal attention by plain matrix products: on CPU, its backward pass is quicker than the fused kernel's."""

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        batch, num_kv_heads, length, width = k_BKTE.shape
        groups = q_BHTE.shape[1] // num_kv_heads
        q = q_BHTE.reshape(batch * num_kv_heads, groups * length, width)
        k, v = k_BKTE.reshape(-1, length, width), v_BKTE.reshape(-1, length, width)
        mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).repeat(groups, 1)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=spec.scale)
        return (scores.softmax(-1) @ v).view_as(q_BHTE)


def loss_of(model: Decoder, block: Tensor) -> Tensor:
    logits = model(block[:, :-1].clamp_min(0), attention=MaterialisedCausal())
    return F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), ignore_index=IGNORED)


def rate(step: int, peak: float) -> float:
    """Two cycles, each with a linear warm-up over 2 % and a cosine to 5 % of its peak; the second peaks at half."""
    first = step < SECOND_CYCLE
    step, steps = (step, SECOND_CYCLE) if first else (step - SECOND_CYCLE, STEPS - SECOND_CYCLE)
    peak = peak if first else peak / 2
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def save(model: Decoder, out: Path) -> None:
    from burnish.models.loading import save_decoder

    save_decoder(model, out, source=None, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="stop after this many, the rates being those of a whole run"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--log", type=Path, default=HERE / "log.jsonl")
    parser.add_argument("--checkpoint", type=Path, help="where to keep the state every 250 steps; resumes from it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    # The model computes in bfloat16; the optimizer works on float32 copies of its weights.
    masters = [p.detach() for p in Decoder(CONFIG).initialize(seed=options.seed).parameters()]
    model = Decoder(CONFIG, dtype=torch.bfloat16)
    weights = list(model.parameters())
    decayed = [p for p in masters if p.dim() > 1]
    others = [p for p in masters if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
        fused=True,
    )
    source = batches(tokenizer, tokens=options.batch_tokens, seed=options.seed)
    held_out = list(itertools.islice(batches(tokenizer, tokens=8192, seed=options.seed + 100), 4))
    pairs = commented_queries(tokenizer, 200)
    first, spent = 0, 0.0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        torch._foreach_copy_(masters, state["masters"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        for _ in range(first):
            next(source)
    torch._foreach_copy_([p.data for p in weights], masters)
    start, tokens, total = time.perf_counter() - spent, 0, 0.0
    log = options.log.open("a" if first else "w")

    def write(record: dict[str, object]) -> None:
        print(record, flush=True)
        log.write(json.dumps(record) + "\n")
        log.flush()

    if not first:
        write(
            {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "threads": options.threads,
                "parameters": sum(p.numel() for p in masters),
                "steps": options.steps,
                "batch_tokens": options.batch_tokens,
            }
        )
    model.train()
    window = time.perf_counter()
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.peak_rate)
        block = next(source)
        loss = loss_of(model, block)
        loss.backward()
        for master, weight in zip(masters, weights):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([p.data for p in weights], masters)
        total += loss.item()
        tokens += int((block >= 0).sum())
        if (step + 1) % 50 == 0:
            now = time.perf_counter()
            write(
                {
                    "step": step + 1,
                    "loss": round(total / 50, 4),
                    "tokens_per_s": round(tokens / (now - window)),
                    "seconds": round(now - start),
                }
            )
            window, tokens, total = now, 0, 0.0
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            with torch.no_grad():
                held = sum(loss_of(model, block).item() for block in held_out) / len(held_out)
            write({"step": step + 1, "held_out_loss": round(held, 4), "commented_queries_right": probe(model, pairs)})
            if options.checkpoint:
                state = {
                    "masters": masters,
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": time.perf_counter() - start,
                }
                torch.save(state, options.checkpoint.with_suffix(".tmp"))
                options.checkpoint.with_suffix(".tmp").rename(options.checkpoint)
            window = time.perf_counter()
    save(model, options.out)
    write({"saved": options.out.name, "seconds": round(time.perf_counter() - start)})


if __name__ == "__main__":
    main()
