"""Adapter folders in PEFT's format, written, and put on a model to train on or to merge.

What is written here PEFT loads over the same base with the same logits, and the reverse. Reading the files is in
`models/adapter_files.py`; which linears of ours stand behind a module of the file, in `models/peft_names.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.compress.frozen_linear import FrozenLinear
from burnish.compress.frozen_loading import format_of
from burnish.errors import ConfigError
from burnish.models.adapter_files import (
    BASE_FORMAT_KEY,
    CONFIG_NAME,
    FINGERPRINT_KEY,
    MAGNITUDE,
    WEIGHTS_NAME,
    fingerprint,
    read_adapter,
)
from burnish.models.checkpoint_writing import pending, write_safetensors, write_text, writing_to
from burnish.models.linears import get_module
from burnish.models.peft_names import KEY_PREFIX, FileModule, file_modules, target_suffixes
from burnish.train.dora import dense_weight
from burnish.train.lora import LoraConfig, LoraLinear, lora_modules, place_adapters


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
    if config is not None and (config.rank, config.scale, config.use_dora) != (
        carried.rank,
        carried.scale,
        carried.use_dora,
    ):
        raise ConfigError("the model carries another adapter", got=carried, expected=config)
    layers = modules.values()
    every = file_modules(model.config)  # type: ignore[arg-type]
    chosen = [entry for entry in every if any(target in modules for target in entry.targets)]
    tensors: dict[str, Tensor] = {}
    for entry in chosen:
        tensors[f"{KEY_PREFIX}{entry.name}.lora_A.weight"] = _shared_a(entry, modules)
        tensors[f"{KEY_PREFIX}{entry.name}.lora_B.weight"] = entry.join(
            [_b_of(model, target, modules, carried.rank) for target in entry.targets]
        )
        if carried.use_dora:
            tensors[f"{KEY_PREFIX}{entry.name}.{MAGNITUDE}"] = entry.join(
                [_magnitude_of(model, target, modules) for target in entry.targets]
            )
    suffixes = target_suffixes([entry.name for entry in chosen], [entry.name for entry in every])
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {FINGERPRINT_KEY: json.dumps(fingerprint(model))}
    formats = {json.dumps(format_of(layer.base).to_dict()) for layer in layers if isinstance(layer.base, FrozenLinear)}
    if len(formats) == 1:
        metadata[BASE_FORMAT_KEY] = formats.pop()
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
        "use_dora": carried.use_dora,
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
    weights = read_adapter(
        folder,
        model.config,  # type: ignore[arg-type]
        base=base,
        base_fingerprint=fingerprint(model),
    )
    config = LoraConfig(
        rank=weights.rank,
        alpha=weights.alpha,
        dropout=weights.dropout,
        target_modules=tuple(dict.fromkeys(name.rpartition(".")[2] for name in weights.pairs)),
        rank_stabilized=weights.rank_stabilized,
        use_dora=bool(weights.magnitudes),
    )
    place_adapters(model, config, list(weights.pairs))
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            a_RI, b_OR = weights.pairs[name]
            module.lora_A.copy_(a_RI)
            module.lora_B.copy_(b_OR)
            if module.lora_magnitude is not None:
                module.lora_magnitude.copy_(weights.magnitudes[name])
    return config


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


def _magnitude_of(model: nn.Module, target: str, modules: dict[str, LoraLinear]) -> Tensor:
    """The trained row lengths of a target; of one without an adapter those that its weight has."""
    module = modules.get(target)
    if module is not None and module.lora_magnitude is not None:
        return module.lora_magnitude.detach()
    return dense_weight(get_module(model, target)).float().norm(dim=1)
