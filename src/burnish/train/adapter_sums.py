"""Several adapters on one base, each with a weight: run unmerged, or merged into one set of weights.

W' = W + sum over i of weight_i * (W_i - W), where W_i is the base with adapter i: for plain adapters the weighted sum
of their scaled products B A, whatever their ranks. The sum is taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.models.linears import set_module
from burnish.train.adapter import load_adapter
from burnish.train.lora import AdaptedLinear, LoraLinear, lora_modules, quantized_merge_error


class WeightedAdapters(AdaptedLinear):
    """A frozen linear under several adapters: base(x) + sum of weight_i * (adapter_i(x) - base(x)).

    Args:
        adapters: on one and the same base.
        weights: one for each.
    """

    def __init__(self, adapters: Sequence[LoraLinear], weights: Sequence[float]) -> None:
        super().__init__(adapters[0].base)
        self.adapters = nn.ModuleList(adapters)
        self.weights = tuple(weights)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        plain = self.base(x)
        out = plain
        for weight, adapter in zip(self.weights, self.adapters):
            out = out + weight * (adapter(x) - plain)
        return out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """See `AdaptedLinear.merged_weight`."""
        if not isinstance(self.base, nn.Linear):
            raise quantized_merge_error("a linear", self.base)
        weight_OI = self.base.weight.float()
        merged_OI = weight_OI.clone()
        for weight, adapter in zip(self.weights, self.adapters):
            assert isinstance(adapter, LoraLinear)
            if adapter.lora_magnitude is None:
                merged_OI.addmm_(adapter.lora_B, adapter.lora_A, alpha=weight * adapter.scale)
            else:
                merged_OI.add_(adapter.sum_weight() - weight_OI, alpha=weight)
        return merged_OI.to(self.base.weight.dtype)


def load_adapters(model: nn.Module, folders: Sequence[Path | str], weights: Sequence[float]) -> None:
    """Put several adapters on `model`, in place, each with its weight; everything else is frozen.

    Args:
        model: the base, dense or quantized, without an adapter.
        folders: adapters of this base, ours or PEFT's; their ranks, targets and kinds may differ.
        weights: finite numbers, one for each.

    Raises:
        ConfigError: numbers differ or a weight is no number; an adapter was made for another base; the model carries
            one already.
        CheckpointError: a file is missing or corrupt.
    """
    check_weights(weights, len(folders))
    carried: dict[str, list[tuple[LoraLinear, float]]] = {}
    for folder, weight in zip(folders, weights):
        load_adapter(model, folder)
        for name, module in lora_modules(model).items():
            carried.setdefault(name, []).append((module, weight))
            set_module(model, name, module.base)
    for name, parts in carried.items():
        layer = WeightedAdapters([module for module, _ in parts], [weight for _, weight in parts])
        set_module(model, name, layer.requires_grad_(False).train(parts[0][0].training))


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raises ConfigError unless there are so many weights, all finite and not all zero."""
    if len(weights) != count:
        raise ConfigError("adapters and weights differ in number", got=f"{count} adapters, {len(weights)} weights")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ConfigError("the adapters' weights cannot be used", got=list(weights), expected="finite, not all zero")
