"""The tokenizer of a model folder, where it has one. Torch-free."""

from __future__ import annotations

from pathlib import Path

from burnish.data.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None where it has no tokenizer files at all (random weights made for measuring).

    Raises:
        CheckpointError: the files are malformed.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return Tokenizer.load(folder)
