"""Plain text as token sequences, for perplexity."""

from __future__ import annotations

import json
from pathlib import Path

from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError


def read_texts(source: str, tokenizer: Tokenizer, *, limit: int | None = None) -> list[list[int]] | None:
    """Token ids of a .txt file (one sequence) or of a JSONL file of {"text": ...} rows; None for any other source.

    Raises:
        DataError: the file is missing or has no text.
    """
    path = Path(source)
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(f"there is no file {path}") from error
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{path} cannot be read as text", got=reason) from error
        if not text.strip():
            raise DataError(f"{path} is empty")
        return [tokenizer.encode_prompt(text)]
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    texts = _text_column(path, limit)
    return None if texts is None else [tokenizer.encode_prompt(text) for text in texts]


def _text_column(path: Path, limit: int | None) -> list[str] | None:
    """The "text" fields of a JSONL file; None when its first row has none."""
    texts: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                return None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "answer" in row:
                return None
            texts.append(row["text"])
            if limit is not None and len(texts) >= limit:
                break
    return texts or None
