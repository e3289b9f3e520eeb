"""Quantized linears put back as dense ones of the very weights they stand for, for formats that know no packed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from burnish.models.linears import set_module


def rebuilt_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The dense weight of a quantized linear, (out, in); None for any other module."""
    exact: Any = getattr(module, "dequantize", None)
    if exact is not None:
        return exact(dtype=dtype)
    fast: Any = getattr(module, "dequantized", None)
    return None if fast is None else fast(dtype)


def dequantize_linears(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Replace every quantized linear in place, one after the other; returns their names."""
    names: list[str] = []
    for name, module in list(model.named_modules()):
        weight = rebuilt_weight(module, dtype)
        if weight is None:
            continue
        bias = getattr(module, "bias", None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        set_module(model, name, linear.eval())
        names.append(name)
    return names
