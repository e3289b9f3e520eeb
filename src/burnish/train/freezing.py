"""What a run trains: the adapters over a frozen base, or every weight that no pattern leaves out."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from burnish.compress.frozen_linear import FrozenLinear, frozen_linears
from burnish.compress.frozen_loading import FrozenFormat
from burnish.compress.int8_frozen import Int8Frozen
from burnish.compress.nf4_linear import Nf4Linear
from burnish.errors import ConfigError
from burnish.train.config import TrainConfig
from burnish.train.lora import lora_parameters

BASE_FORMATS = {"qlora-4bit": FrozenFormat(kind="nf4"), "qlora-8bit": FrozenFormat(kind="int8")}
"""How each method wants its base's linears."""

_BASE_LAYERS: dict[str, type[FrozenLinear]] = {"qlora-4bit": Nf4Linear, "qlora-8bit": Int8Frozen}


def trainable_parameters(model: nn.Module, config: TrainConfig) -> list[nn.Parameter]:
    """The parameters that a run trains, in the model's order; all others are frozen, in place.

    Raises:
        ConfigError: the method and the model do not fit together, or a pattern of `config.freeze` matches nothing.
    """
    adapters = lora_parameters(model)
    if config.method == "full":
        if adapters:
            raise ConfigError('method "full" cannot train a model that carries an adapter', remedy="Merge it first.")
        if any(buffer.dtype in (torch.int32, torch.uint8, torch.int8) for buffer in model.buffers()):
            raise ConfigError("quantized weights cannot be trained in full", remedy='Use method "lora".')
        model.requires_grad_(True)
        freeze_parameters(model, config.freeze)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not adapters:
        raise ConfigError(
            f'method "{config.method}" needs a model that carries an adapter', remedy="Call attach_lora first."
        )
    _check_base(model, config.method)
    model.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    return adapters


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take the gradient from every parameter that a glob pattern names ("model.layers.0.*"), in place.

    Returns:
        Their names, in the model's order.

    Raises:
        ConfigError: a pattern matches nothing, or all parameters would be frozen.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            close = difflib.get_close_matches(pattern, _candidates(parameters), n=1, cutoff=0.4)
            raise ConfigError(
                "no parameter matches the pattern to freeze",
                got=repr(pattern),
                expected=f"a pattern such as {next(iter(parameters), '*')}",
                remedy=f'Did you mean "{close[0]}"?' if close else None,
            )
        frozen.update(matched)
    if parameters and len(frozen) == len(parameters):
        raise ConfigError("the patterns freeze every parameter", got=", ".join(patterns))
    for name in frozen:
        parameters[name].requires_grad_(False)
    return [name for name in parameters if name in frozen]


def _candidates(parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names, and every module that holds some as a pattern."""
    folders = {name.rsplit(".", cut)[0] + ".*" for name in parameters for cut in range(1, name.count(".") + 1)}
    return [*parameters, *sorted(folders)]


def _check_base(model: nn.Module, method: str) -> None:
    wanted = _BASE_LAYERS.get(method)
    if wanted is not None and not any(isinstance(layer, wanted) for layer in frozen_linears(model).values()):
        raise ConfigError(
            f'method "{method}" needs a base whose linears are {BASE_FORMATS[method].kind}',
            remedy="Load it with load_frozen, or call freeze_in_place before attach_lora.",
        )
