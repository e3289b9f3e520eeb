"""From a model's name to its shape, without weights and torch: folders, bundled models, published shapes, hub ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.bundled import BUNDLED, bundled_path
from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.hf_config import config_of, read_config, read_json_object
from burnish.models.shapes import SHAPES

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model as a plan sees it.

    Attributes:
        name: as it was asked for.
        config: its shape.
        stored_dtype: of the checkpoint, where config.json tells.
        weight_format: "int8" or "int4" for a quantized folder; None for dense weights.
        folder: where it lies; None for shapes and hub ids.
        disk_bytes: of its weight files; None without a folder.
    """

    name: str
    config: ModelConfig
    stored_dtype: str | None
    weight_format: str | None
    folder: Path | None
    disk_bytes: int | None


def find_model(name: str | Path, *, revision: str | None = None, offline: bool = False) -> ModelSource:
    """Read the shape that a name stands for; of a hub repository only config.json is fetched.

    Args:
        name: a folder, a bundled model, a published shape (`burnish synth` lists them), `org/name` or
            `org/name@revision`.

    Raises:
        CheckpointError: there is no such model, or its config.json is malformed or of an unknown
            architecture.
    """
    folder = _local_folder(name)
    if folder is not None:
        return source_of(str(name), read_config(folder), folder=folder)
    text = str(name)
    if text in SHAPES:
        return source_of(text, SHAPES[text])
    hub_id, _, at_revision = text.partition("@")
    if _HUB_ID.match(hub_id) and not text.startswith((".", "/", "~")):
        return source_of(text, read_json_object(_hub_config(hub_id, revision or at_revision or None, offline=offline)))
    raise CheckpointError(
        f"{text} is neither a folder, a bundled model, a hub id like org/name nor a published shape",
        remedy=f"Published shapes: {', '.join(SHAPES)}.",
    )


def source_of(name: str, hf_config: Mapping[str, Any], *, folder: Path | None = None) -> ModelSource:
    """The record of a parsed config.json; raises as `find_model`."""
    try:
        config = config_of(hf_config)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy
        ) from error
    stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype")).removeprefix("torch.")
    weights = [] if folder is None else [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return ModelSource(
        name=name,
        config=config,
        stored_dtype=stored if stored in DTYPES else None,
        weight_format=_weight_format(hf_config),
        folder=folder,
        disk_bytes=sum(path.stat().st_size for path in weights) or None,
    )


def _weight_format(hf_config: Mapping[str, Any]) -> str | None:
    quantization = hf_config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    bits = quantization.get("bits")
    if bits is None and quantization.get("load_in_4bit"):
        return "nf4"
    if bits is None and quantization.get("load_in_8bit"):
        return "int8"
    return {8: "int8", 4: "int4"}.get(bits) if isinstance(bits, int) else None


def _local_folder(name: str | Path) -> Path | None:
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file", expected="a model folder", remedy=f"Give its folder: {path.parent}")
    return bundled_path(str(name)) if str(name) in BUNDLED else None


def _hub_config(hub_id: str, revision: str | None, *, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    label = hub_id if revision is None else f"{hub_id}@{revision}"
    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        remedy = "Run once without --offline." if offline else "Is the network there?"
        raise CheckpointError(f"{label} is not a local folder and not in the hub's cache", remedy=remedy) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"config.json of {label} cannot be downloaded: {reason}") from error
