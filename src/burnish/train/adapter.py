"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

What is written here PEFT loads over the same base with the same logits, and the reverse. Which linears of ours stand
behind a module of the file is in `peft_names.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from burnish.errors import CheckpointError, ConfigError
from burnish.models.checkpoint import read_header, read_json_object
from burnish.models.checkpoint_writing import pending, write_safetensors, write_text, writing_to
from burnish.models.linears import get_module
from burnish.train.lora import LoraConfig, LoraLinear, lora_modules, place_adapters
from burnish.train.peft_names import KEY_PREFIX, FileModule, file_modules, target_suffixes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FINGERPRINT_KEY = "burnish_base_fingerprint"
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
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
}


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
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ConfigError(f"{path}: r and lora_alpha must be positive numbers", got=f"r {rank}, lora_alpha {alpha}")
    return record


def save_adapter(model: nn.Module, folder: Path | str, *, base: str, config: LoraConfig | None = None) -> None:
    """Write the adapter that `model` carries, for PEFT and for `load_adapter`; each file whole or not at all.

    Args:
        model: carries an adapter.
        folder: created when missing.
        base: recorded as base_model_name_or_path: hub id, folder or bundled name.
        config: if given, has to be the one that the model carries.

    Raises:
        ConfigError: the model carries no adapter, or `config` is another one.
        CapacityError: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    modules = lora_modules(model)
    if not modules:
        raise ConfigError("the model carries no adapter to save")
    carried = next(iter(modules.values())).config
    if config is not None and (config.rank, config.scale) != (carried.rank, carried.scale):
        raise ConfigError("the model carries another adapter", got=carried, expected=config)
    every = file_modules(model.config)  # type: ignore[arg-type]
    chosen = [entry for entry in every if any(target in modules for target in entry.targets)]
    tensors: dict[str, Tensor] = {}
    for entry in chosen:
        tensors[f"{KEY_PREFIX}{entry.name}.lora_A.weight"] = _shared_a(entry, modules)
        tensors[f"{KEY_PREFIX}{entry.name}.lora_B.weight"] = entry.join(
            [_b_of(model, target, modules, carried.rank) for target in entry.targets]
        )
    suffixes = target_suffixes([entry.name for entry in chosen], [entry.name for entry in every])
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {FINGERPRINT_KEY: json.dumps(fingerprint(model))}
    write_safetensors(
        folder / WEIGHTS_NAME, {key: pending(tensor) for key, tensor in tensors.items()}, metadata=metadata
    )
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": carried.rank,
        "lora_alpha": carried.alpha,
        "lora_dropout": carried.dropout,
        "use_rslora": carried.rank_stabilized,
        "target_modules": suffixes,
        "fan_in_fan_out": any(entry.stored_transposed for entry in chosen),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_text(folder / CONFIG_NAME, json.dumps(record, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: Path | str, *, base: str | None = None) -> LoraConfig:
    """Put the adapter of a folder (ours or PEFT's) on `model`, in place; everything else is frozen.

    Args:
        model: the base, dense or quantized.
        folder: adapter_config.json and adapter_model.safetensors.
        base: what the model is called, for messages.

    Returns:
        The adapter's settings; its targets are roles of the linears that carry it.

    Raises:
        ConfigError: made for another base, or with options that are not supported.
        CheckpointError: a file is missing or corrupt.
    """
    folder = Path(folder)
    record = read_adapter_config(folder)
    tensors, metadata = _read_tensors(folder)
    ours = base or f"a {model.config.family} model of hidden size {model.config.hidden_size}"  # type: ignore[union-attr]
    mismatch = _Mismatch(folder, str(record.get("base_model_name_or_path") or "an unnamed base"), ours)
    if FINGERPRINT_KEY in metadata:
        _check_fingerprint(model, metadata[FINGERPRINT_KEY], mismatch)
    pairs = _pairs(tensors, folder)
    entries = {entry.name: entry for entry in file_modules(model.config)}  # type: ignore[arg-type]
    for name in pairs:
        if name not in entries:
            raise mismatch.error(f"it has no linear {name}")
    rank = int(record["r"])
    placed: dict[str, tuple[Tensor, Tensor]] = {}
    for name, entry in entries.items():
        if name in pairs:
            placed.update(_placed(model, entry, *pairs[name], rank, mismatch))
    roles = tuple(dict.fromkeys(name.rpartition(".")[2] for name in placed))
    config = LoraConfig(
        rank=rank,
        alpha=record["lora_alpha"],
        dropout=float(record.get("lora_dropout") or 0.0),
        target_modules=roles,
        rank_stabilized=bool(record.get("use_rslora")),
    )
    place_adapters(model, config, list(placed))
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            module.lora_A.copy_(placed[name][0])
            module.lora_B.copy_(placed[name][1])
    return config


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of the embedding and of the outermost dense linears, by which another base is recognised.

    Values, not a hash, so that the same base is recognised in another dtype; linears that are quantized are left out.
    """
    names = ["model.embed_tokens", *_outermost_linears(model)]
    values: dict[str, list[float]] = {}
    for name in names:
        module = get_module(model, name)
        module = module.base if isinstance(module, LoraLinear) else module
        if isinstance(module, nn.Linear | nn.Embedding):
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


def _check_fingerprint(model: nn.Module, recorded: str, mismatch: _Mismatch) -> None:
    try:
        theirs: dict[str, list[float]] = json.loads(recorded)
    except ValueError as error:
        raise CheckpointError(f"{mismatch.folder / WEIGHTS_NAME}: the base's fingerprint is not JSON") from error
    ours = fingerprint(model)
    for name in theirs.keys() & ours.keys():
        difference = sum(abs(mine - other) for mine, other in zip(ours[name], theirs[name]))
        size = sum(abs(other) for other in theirs[name])
        if difference > FINGERPRINT_TOLERANCE * size:
            raise mismatch.error(f"the weights of {name} differ")


def _shared_a(entry: FileModule, modules: dict[str, LoraLinear]) -> Tensor:
    carried = [modules[target].lora_A.detach() for target in entry.targets if target in modules]
    if any(other.data_ptr() != carried[0].data_ptr() for other in carried):
        raise ConfigError(
            f"{entry.name} has one A in the file, but its parts carry different ones",
            remedy="Attach the adapter with attach_lora, which shares A where files fuse linears.",
        )
    return carried[0]


def _b_of(model: nn.Module, target: str, modules: dict[str, LoraLinear], rank: int) -> Tensor:
    if target in modules:
        return modules[target].lora_B.detach()
    linear = get_module(model, target)
    device = next(iter(modules.values())).lora_B.device
    return torch.zeros(int(linear.out_features), rank, device=device)  # type: ignore[arg-type]


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS_NAME
    if not path.exists():
        pickled = folder / "adapter_model.bin"
        remedy = "Save it again with PEFT as safetensors." if pickled.exists() else None
        raise CheckpointError(f"{path} does not exist", got=pickled.name if pickled.exists() else None, remedy=remedy)
    read_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


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
    model: nn.Module, entry: FileModule, a_RI: Tensor, b_OR: Tensor, rank: int, mismatch: _Mismatch
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each of our linears behind one module of the file.

    Parts of a fused module that the adapter leaves untouched (all rows of B zero, other parts not) get none.
    """
    linears = [get_module(model, target) for target in entry.targets]
    out_features = sum(int(linear.out_features) for linear in linears)  # type: ignore[arg-type]
    in_features = int(linears[0].in_features)  # type: ignore[arg-type]
    if a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise CheckpointError(
            f"{mismatch.folder / WEIGHTS_NAME}: A and B of {entry.name} are not of rank {rank}",
            got=f"{list(a_RI.shape)} and {list(b_OR.shape)}",
        )
    if (a_RI.shape[1], b_OR.shape[0]) != (in_features, out_features):
        raise mismatch.error(
            f"{entry.name} is {out_features} x {in_features}, the adapter's {b_OR.shape[0]} x {a_RI.shape[1]}"
        )
    parts = dict(zip(entry.targets, entry.split(b_OR)))
    touched = {target: part for target, part in parts.items() if part.any()} or parts
    return {target: (a_RI, part) for target, part in touched.items()}
