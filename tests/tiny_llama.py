"""A tiny random Llama with the bundled tokenizer, and rows to tune it on: enough for every stage, quick on one core."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from burnish.data.bundled import bundled_path
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import save_decoder

VOCAB = 3072
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
QUESTIONS = (
    ("How many ships are there?", "SELECT COUNT(*) FROM ship"),
    ("List the names of all ships.", "SELECT name FROM ship"),
    ("Which ships were built after 1990?", "SELECT name FROM ship WHERE built > 1990"),
    ("What is the oldest ship?", "SELECT name FROM ship ORDER BY built LIMIT 1"),
)
SCHEMA = "CREATE TABLE ship (name TEXT, built INTEGER);"


def write_tiny_llama(folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    """Save a random model whose greedy answers vary from token to token; the same seed gives the same weights."""
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden // 4,
        rotary_dim=hidden // 4,
        max_position_embeddings=256,
        eos_ids=(5,),
    )
    decoder = Decoder(config).initialize(std=0.15, seed=seed).eval()
    save_decoder(decoder, folder, source=None, dtype=torch.float32)
    for name in TOKENIZER_FILES:
        source = bundled_path("burnish-sql-base") / name
        if source.is_file():
            shutil.copy(source, folder / name)
    return folder


def sql_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the question, context, answer layout."""
    return [
        {"question": f"{question} ({number})", "context": SCHEMA, "answer": answer}
        for number, (question, answer) in ((n, QUESTIONS[n % len(QUESTIONS)]) for n in range(count))
    ]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
