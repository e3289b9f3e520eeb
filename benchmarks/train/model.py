"""A model folder for these benchmarks: random weights in a published shape, spelled with a real tokenizer.

    python benchmarks/train/model.py 135m ~/models/135m --tokenizer FOLDER

The vocabulary is the tokenizer's, so that rows have the lengths that real text has. The 135M work of the README is
SmolLM-135M's shape with a Llama vocabulary of 32,000: 124.6 million numbers, 106 million of them in the blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from burnish.data.tokenizer import Tokenizer
from burnish.models.loading import load_config
from burnish.models.shapes import hf_config_of_shape
from burnish.models.synth import write_random_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="published shape, such as 135m or tinyllama-1.1b")
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--dtype", default="bfloat16")
    flags = parser.parse_args()
    tokenizer = Tokenizer.load(flags.tokenizer)
    shape = hf_config_of_shape(flags.shape)
    begin = shape["bos_token_id"] if tokenizer.bos_id is None else tokenizer.bos_id
    end = shape["eos_token_id"] if tokenizer.eos_id is None else tokenizer.eos_id
    shape |= {"vocab_size": tokenizer.vocab_size, "bos_token_id": begin, "eos_token_id": end}
    write_random_checkpoint(shape, flags.out, dtype=flags.dtype)
    _write_tokenizer(tokenizer, flags.out, begin=begin, end=end)
    print(f"{flags.out}: {flags.shape}, {load_config(flags.out).num_parameters():,} numbers")
    return 0


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, *, begin: int, end: int) -> None:
    """In the one form that every trainer reads."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    record = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.token(begin),
        "eos_token": tokenizer.token(end),
        "unk_token": None if tokenizer.unk_id is None else tokenizer.token(tokenizer.unk_id),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
