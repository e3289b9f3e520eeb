"""Adapter folders in PEFT's format, read: adapter_config.json and adapter_model.safetensors.

Which linears of ours stand behind a module of the file is in `peft_names.py`. Training and writing adapters is in
`train/`; serving them, in `engine/`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from burnish.errors import CheckpointError, ConfigError
from burnish.models.checkpoint import read_header, read_json_object
from burnish.models.config import ModelConfig
from burnish.models.peft_names import KEY_PREFIX, FileModule, file_modules

# R rank, I in features, O out features

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"
FINGERPRINT_KEY = "burnish_base_fingerprint"
BASE_FORMAT_KEY = "burnish_base_format"
FINGERPRINT_VALUES = 32
FINGERPRINT_TOLERANCE = 0.01  # mean relative difference; rounding to bfloat16 makes about 0.0015

# Options of the format that change what an adapter computes and that are not built here: key -> values that mean "off".
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
}


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """An adapter as it is read.

    Attributes:
        folder: where it lies.
        rank, alpha, dropout, rank_stabilized: see `train.lora.LoraConfig`.
        pairs: (A, B) by the canonical name of the linear, (rank, in) and (out, rank), float32; B is not scaled. The A
            of linears that are one module in the files is one tensor.
        magnitudes: DoRA's row lengths by the same names, (out,), float32; empty for a plain adapter.
        base_format: how the base was frozen while the adapter was trained, as written; None for a dense base.
    """

    folder: Path
    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    base_format: Mapping[str, Any] | None = None

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return lora_scale(rank=self.rank, alpha=self.alpha, rank_stabilized=self.rank_stabilized)


def lora_scale(*, rank: int, alpha: float, rank_stabilized: bool) -> float:
    """The factor of B A: alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def read_adapter(
    folder: Path | str,
    config: ModelConfig,
    *,
    base: str | None = None,
    base_fingerprint: Mapping[str, list[float]] | None = None,
) -> LoraWeights:
    """Read an adapter folder (ours or PEFT's) for a model of this config.

    Args:
        base: what the model is called, for messages.
        base_fingerprint: the model's `fingerprint`, by which an adapter of other weights is told apart.

    Raises:
        ConfigError: made for another base, or with options that are not supported.
        CheckpointError: a file is missing or corrupt, or holds NaN or infinite weights.
    """
    folder = Path(folder)
    record = read_adapter_config(folder)
    tensors, metadata = _read_tensors(folder)
    ours = base or f"a {config.family} model of hidden size {config.hidden_size}"
    mismatch = _Mismatch(folder, str(record.get("base_model_name_or_path") or "an unnamed base"), ours)
    if base_fingerprint is not None and FINGERPRINT_KEY in metadata:
        _check_fingerprint(base_fingerprint, metadata[FINGERPRINT_KEY], mismatch)
    magnitudes = _taken_magnitudes(tensors)
    pairs = _pairs(tensors, folder)
    entries = {entry.name: entry for entry in file_modules(config)}
    for name in pairs:
        if name not in entries:
            raise mismatch.error(f"it has no linear {name}")
    if set(magnitudes) != (set(pairs) if record.get("use_dora") else set()):
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} does not hold the magnitudes that {CONFIG_NAME} speaks of",
            got=f"{len(magnitudes)} for {len(pairs)} linears, use_dora {bool(record.get('use_dora'))}",
        )
    rank = int(record["r"])
    shapes = config.linear_shapes()
    placed: dict[str, tuple[Tensor, Tensor]] = {}
    lengths: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name in pairs:
            placed.update(_placed(shapes, entry, *pairs[name], rank, mismatch, keep_all=name in magnitudes))
        if name in magnitudes:
            lengths.update(_placed_magnitudes(shapes, entry, magnitudes[name], mismatch))
    return LoraWeights(
        folder=folder,
        rank=rank,
        alpha=float(record["lora_alpha"]),
        dropout=float(record.get("lora_dropout") or 0.0),
        rank_stabilized=bool(record.get("use_rslora")),
        pairs=placed,
        magnitudes=lengths,
        base_format=_base_format(metadata, folder),
    )


def is_adapter_folder(folder: Path | str) -> bool:
    """Whether the folder holds an adapter."""
    return (Path(folder) / CONFIG_NAME).is_file()


def read_adapter_config(folder: Path | str) -> dict[str, Any]:
    """Parse adapter_config.json; "base_model_name_or_path" names the base.

    Raises:
        CheckpointError: missing or not JSON.
        ConfigError: not a LoRA adapter, or one with options that are not supported.
    """
    path = Path(folder) / CONFIG_NAME
    record = read_json_object(path, remedy="Give an adapter folder, as `burnish tune` or PEFT write it.")
    if record.get("peft_type") != "LORA":
        raise ConfigError(f"{path} is not a LoRA adapter", got=repr(record.get("peft_type")), expected="peft_type LORA")
    for key, off in _UNSUPPORTED.items():
        if key in record and record[key] not in off:
            raise ConfigError(
                f"{path}: {key} is not supported", got=record[key], remedy="Merge this adapter with PEFT instead."
            )
    start = record.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise ConfigError(
            f"{path}: an adapter started by {start} belongs to a changed base",
            remedy="Convert it to a plain LoRA with PEFT first.",
        )
    rank, alpha = record.get("r"), record.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(f"{path}: r and lora_alpha must be positive numbers", got=f"r {rank}, lora_alpha {alpha}")
    return record


def read_base_format(folder: Path | str) -> dict[str, Any] | None:
    """How the base was frozen while the adapter of this folder was trained, as written; None for a dense base.

    Raises:
        CheckpointError: the weights are missing or corrupt.
    """
    return _base_format(_read_metadata(Path(folder) / WEIGHTS_NAME), Path(folder))


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of the embedding and of the outermost dense linears, by which another base is recognised.

    Values, not a hash, so that the same base is recognised in another dtype; linears that are quantized are left out.
    """
    modules = dict(model.named_modules())
    values: dict[str, list[float]] = {}
    for name in ("model.embed_tokens", *_outermost_linears(model)):
        # Under an adapter the linear is its base. A decoder laid out for generating has no linears of these names.
        module = modules.get(f"{name}.base", modules.get(name))
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel():
            flat = module.weight.detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64).long()
            values[name] = [float(f"{value:.6g}") for value in flat[places.to(flat.device)].float().tolist()]
    return values


class _Mismatch:
    """Builds the error that names both bases."""

    def __init__(self, folder: Path, theirs: str, ours: str) -> None:
        self.folder, self.theirs, self.ours = folder, theirs, ours

    def error(self, why: str) -> ConfigError:
        return ConfigError(
            f"the adapter {self.folder} was made for {self.theirs} and does not fit {self.ours}: {why}",
            remedy="Load it over the base that it was trained on.",
        )


def _outermost_linears(model: nn.Module) -> list[str]:
    names = [name for name in model.config.linear_shapes() if name != "lm_head"]  # type: ignore[union-attr]
    return [names[0], names[-1]] if names else []


def _check_fingerprint(ours: Mapping[str, list[float]], recorded: str, mismatch: _Mismatch) -> None:
    try:
        theirs: dict[str, list[float]] = json.loads(recorded)
    except ValueError as error:
        raise CheckpointError(f"{mismatch.folder / WEIGHTS_NAME}: the base's fingerprint is not JSON") from error
    for name in theirs.keys() & ours.keys():
        difference = sum(abs(mine - other) for mine, other in zip(ours[name], theirs[name]))
        size = sum(abs(other) for other in theirs[name])
        if difference > FINGERPRINT_TOLERANCE * size:
            raise mismatch.error(f"the weights of {name} differ, in the same shape; a merged copy is another base")


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS_NAME
    if not path.exists():
        pickled = folder / "adapter_model.bin"
        remedy = "Save it again with PEFT as safetensors." if pickled.exists() else None
        raise CheckpointError(f"{path} does not exist", got=pickled.name if pickled.exists() else None, remedy=remedy)
    read_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_metadata(path: Path) -> dict[str, str]:
    read_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _base_format(metadata: Mapping[str, str], folder: Path) -> dict[str, Any] | None:
    if BASE_FORMAT_KEY not in metadata:
        return None
    try:
        record = json.loads(metadata[BASE_FORMAT_KEY])
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: the base's format is not a JSON object")
    return record


def _taken_magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's tensors by the name of the file's module, taken out of `tensors`."""
    found: dict[str, Tensor] = {}
    for key in list(tensors):
        module, _, last = key.removesuffix(".weight").rpartition(".")
        if last == MAGNITUDE and key.startswith(KEY_PREFIX):
            found[module.removeprefix(KEY_PREFIX)] = tensors.pop(key)
    return found


def _placed_magnitudes(
    shapes: Mapping[str, tuple[int, int]], entry: FileModule, magnitude_O: Tensor, mismatch: _Mismatch
) -> dict[str, Tensor]:
    out_features = sum(shapes[target][0] for target in entry.targets)
    if tuple(magnitude_O.shape) != (out_features,) or not magnitude_O.isfinite().all():
        raise CheckpointError(
            f"{mismatch.folder / WEIGHTS_NAME}: {entry.name} has magnitudes that cannot be used",
            got=list(magnitude_O.shape),
            expected=f"{out_features} finite numbers",
        )
    return dict(zip(entry.targets, entry.split(magnitude_O.float())))


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the file's module."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, half = key.removesuffix(".weight").rpartition(".")
        if not key.startswith(KEY_PREFIX) or half not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise ConfigError(f"{folder / WEIGHTS_NAME}: {key} is not part of a plain LoRA adapter")
        halves.setdefault(module.removeprefix(KEY_PREFIX), {})[half] = tensor
    for module, found in halves.items():
        if len(found) != 2:
            missing = "lora_B" if "lora_A" in found else "lora_A"
            raise CheckpointError(f"{folder / WEIGHTS_NAME} lacks {KEY_PREFIX}{module}.{missing}.weight")
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} holds no adapter")
    return {module: (found["lora_A"], found["lora_B"]) for module, found in halves.items()}


def _placed(
    shapes: Mapping[str, tuple[int, int]],
    entry: FileModule,
    a_RI: Tensor,
    b_OR: Tensor,
    rank: int,
    mismatch: _Mismatch,
    *,
    keep_all: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each of our linears behind one module of the file.

    Parts of a fused module that the adapter leaves untouched (all rows of B zero, other parts not) get none, unless
    all are to be kept.
    """
    out_features = sum(shapes[target][0] for target in entry.targets)
    in_features = shapes[entry.targets[0]][1]
    if a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise CheckpointError(
            f"{mismatch.folder / WEIGHTS_NAME}: A and B of {entry.name} are not of rank {rank}",
            got=f"{list(a_RI.shape)} and {list(b_OR.shape)}",
        )
    if (a_RI.shape[1], b_OR.shape[0]) != (in_features, out_features):
        raise mismatch.error(
            f"{entry.name} is {out_features} x {in_features}, the adapter's {b_OR.shape[0]} x {a_RI.shape[1]}"
        )
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        raise CheckpointError(f"{mismatch.folder / WEIGHTS_NAME}: {entry.name} holds NaN or infinite weights")
    a_RI, b_OR = a_RI.float(), b_OR.float()
    parts = dict(zip(entry.targets, entry.split(b_OR)))
    touched = {target: part for target, part in parts.items() if keep_all or part.any()} or parts
    return {target: (a_RI, part) for target, part in touched.items()}
