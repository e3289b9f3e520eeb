"""A tokenizer folder written to disk, in any of the shapes that Hugging Face folders come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import BACKENDS, MakeFolder


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a tokenizer folder: make_folder(kind, settings, files={name: JSON value or text})."""

    def make(
        kind: str = "byte-level", settings: dict[str, Any] | None = None, *, files: dict[str, Any] | None = None
    ) -> Path:
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        BACKENDS[kind]().save(str(folder / "tokenizer.json"))
        base = {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 512,
        }
        contents = {"tokenizer_config.json": base | (settings or {})} | (files or {})
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make
