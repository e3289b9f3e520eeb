"""The manifest that every artifact carries: what it was made from, how, with which versions, and what was measured.

`burnish.json` in the artifact's folder is the source of truth; whatever else is told about the artifact mirrors it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.json_values import to_plain
from burnish.models.atomic_files import write_text, writing_to

MANIFEST_NAME = "burnish.json"
GOLDEN_TEXT = "SELECT name FROM café WHERE id = 42; -- naïve 東京 🙂"
_SAMPLE_BYTES = 1 << 20


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over names, sizes, first and last MiB of a folder's weight files: quick, and other for other weights."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def describe_input(folder: Path, *, name: str | None = None) -> dict[str, Any]:
    """An input as a manifest names it."""
    return {"path": str(name or folder), "fingerprint": fingerprint_folder(folder)}


def write_manifest(
    folder: Path,
    *,
    kind: str,
    inputs: Mapping[str, Any],
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    gate: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    name: str = MANIFEST_NAME,
) -> dict[str, Any]:
    """Write the artifact's manifest, through a temporary name.

    Args:
        kind: "adapter", "merged", "quantized", "pruned", "exported" or "tuned".
        inputs: name -> `describe_input`.
        config: the resolved settings.
        figures: what was measured.
        gate: the comparison with the parent and its verdict.
        data: what later stages need to make examples as this one did: source, template, max_length.
        name: of the file, where the artifact is a file and not a folder of its own.
    """
    record = {
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": to_plain(inputs),
        "config": to_plain(config),
        "data": to_plain(data),
        "figures": to_plain(figures),
        "gate": to_plain(gate),
        "hardware": hardware_record(),
        "versions": version_record(),
    }
    if tokenizer is not None:
        record["chat_template"] = tokenizer.chat_template
        record["golden_tokens"] = {"text": GOLDEN_TEXT, "ids": tokenizer.encode(GOLDEN_TEXT)}
    write_text(folder / name, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def withdraw_manifest(folder: Path, *, name: str = MANIFEST_NAME) -> None:
    """Remove the manifest of what has just been replaced: its verdict is not the new artifact's.

    Raises:
        CheckpointError: it cannot be removed.
    """
    with writing_to(folder):
        (folder / name).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The artifact's manifest; None for a folder that has none (another tool made it).

    Raises:
        CheckpointError: the file is there but is not a JSON object.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read", got=error, remedy="Delete it, or make the artifact again."
        ) from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not a JSON object", got=type(record).__name__)
    return record
