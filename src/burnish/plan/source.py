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
        weight_format: what a quantized folder is run in: "int8", "int4" or "w8a8"; None for dense weights, which
            those of bitsandbytes become while they are read.
        group_size: of a quantized folder; None where it does not say.
        folder: where it lies; None for shapes and hub ids.
        disk_bytes: of its weight files; None without a folder.
    """

    name: str
    config: ModelConfig
    stored_dtype: str | None
    weight_format: str | None
    folder: Path | None
    disk_bytes: int | None
    group_size: int | None = None


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
        group_size=_group_size(hf_config),
    )


def quantization_label(hf_config: Mapping[str, Any]) -> str | None:
    """How the linears of a folder are quantized, as "gptq-4bit" or "compressed-tensors-w8a8"; None for dense ones."""
    record = hf_config.get("quantization_config")
    if not isinstance(record, Mapping):
        return None
    method = str(record.get("quant_method", "quantized"))
    scheme = _main_scheme(record)
    if scheme is not None:
        weights = scheme.get("weights") or {}
        activations = (scheme.get("input_activations") or {}).get("num_bits", 16)
        return f"{method}-w{weights.get('num_bits', 16)}a{activations}"
    bits = record.get("bits")
    if bits is None:
        bits = 4 if record.get("load_in_4bit") else 8 if record.get("load_in_8bit") else None
    return f"{method}-{bits}bit" if bits else method


def _main_scheme(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of compressed-tensors' groups the one that is for all linears, else the first."""
    groups = record.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    return next((scheme for scheme in schemes if "Linear" in (scheme.get("targets") or ())), next(iter(schemes), None))


def _weight_format(hf_config: Mapping[str, Any]) -> str | None:
    label = quantization_label(hf_config)
    if label is None or label.startswith("bitsandbytes"):
        return None
    if label.endswith("-w8a8"):
        return "w8a8"
    by_end = {"-8bit": "int8", "-4bit": "int4", "-w8a16": "int8", "-w4a16": "int4"}
    return next((name for end, name in by_end.items() if label.endswith(end)), None)


def _group_size(hf_config: Mapping[str, Any]) -> int | None:
    record = hf_config.get("quantization_config")
    if not isinstance(record, Mapping):
        return None
    scheme = _main_scheme(record)
    size = record.get("group_size") if scheme is None else (scheme.get("weights") or {}).get("group_size") or -1
    return size if isinstance(size, int) and (size > 0 or size == -1) else None


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
