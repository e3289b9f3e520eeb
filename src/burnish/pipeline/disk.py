"""What an artifact weighs on disk."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (".safetensors", ".bin")


def folder_bytes(folder: str | Path) -> int:
    """Bytes of every file below a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def weight_file_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix in _WEIGHTS)
