"""Reading a model folder's config.json as a `ModelConfig`. Torch-free, so that `plan` can use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.errors import CheckpointError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.families.registry import family_for


def read_config(folder: str | Path) -> dict[str, Any]:
    """Parse a model folder's config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or it is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a model folder", remedy="Give a folder with config.json, or a hub id.")
    return read_json_object(folder / "config.json", remedy="Give a folder with config.json and *.safetensors.")


def read_json_object(path: Path, *, remedy: str | None = None) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, unreadable or something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", remedy=remedy) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is not a JSON object", got=type(record).__name__)
    return record


def load_config(folder: str | Path) -> ModelConfig:
    """Read a model folder's config.json as a `ModelConfig`.

    Raises:
        CheckpointError: it is missing, malformed, or of an architecture that no family has.
    """
    return config_of(read_config(folder))


def config_of(hf_config: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed config.json; raises as `load_config`."""
    family = family_for(hf_config)
    try:
        return family.config_from_hf(hf_config)
    except ConfigError as error:
        raise CheckpointError(
            f"config.json: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json has a value of the wrong kind: {error}") from error
