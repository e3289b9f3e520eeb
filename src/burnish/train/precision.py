"""What a run computes in, and how the model is brought there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.train.config import TrainConfig


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (on CPUs: AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(model: nn.Module, config: TrainConfig) -> Literal["float32", "bfloat16", "float16"]:
    """The precision that a run computes in.

    "auto": the weights' own when they are bfloat16; otherwise bfloat16 where the device multiplies it in hardware (CUDA
    cards since Ampere, CPUs with AVX512-BF16 or AMX), float16 with loss scaling on older CUDA cards, and float32
    elsewhere, where the others would be slower. Trained parameters, their gradients and the optimizer are float32 in
    every case.

    Raises:
        ConfigError: the weights' dtype does not allow what is asked for.
    """
    floating = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = next(model.parameters()).device
    if config.method == "full" and floating != {torch.float32}:
        raise ConfigError(
            "full fine-tuning keeps its weights in float32",
            got=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floating)),
            remedy='Load the model with dtype "float32"; precision "bfloat16" still computes in bfloat16.',
        )
    if torch.float16 in floating:
        raise ConfigError(
            "training on float16 weights would overflow", remedy='Load the model as "bfloat16" or "float32".'
        )
    if torch.bfloat16 in floating:
        if config.precision in ("float32", "float16"):
            raise ConfigError(
                f"precision {config.precision} needs float32 weights",
                got="bfloat16",
                remedy='Load the model as "float32".',
            )
        return "bfloat16"
    if config.precision == "auto":
        if bfloat16_is_native(device):
            return "bfloat16"
        return "float16" if device.type == "cuda" else "float32"
    return config.precision


def dtype_to_load(config: TrainConfig, device: str, *, sharded: bool = False) -> Literal["float32", "bfloat16"]:
    """What to load a base in, so that a run never holds it twice: bfloat16 where a frozen base computes in it.

    Losses are those of a base that is loaded in float32 and cast. Weights that are trained, or `sharded` (their shares
    are gathered in float32), need float32.
    """
    if config.method == "full" or sharded:
        return "float32"
    computes = config.precision == "bfloat16" or (
        config.precision == "auto" and bfloat16_is_native(torch.device(device))
    )
    return "bfloat16" if computes else "float32"


@contextlib.contextmanager
def frozen_in_bfloat16(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Hold frozen float32 parameters in bfloat16 inside the block, and give back the very same tensors after it.

    Faster and smaller than autocast, which casts every weight again in every pass and keeps a cast copy of every input;
    it costs half the weights' size while both exist.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if enabled:
            for parameter in model.parameters():
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.bfloat16()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextlib.contextmanager
def frozen_linears_in_float16(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Hold frozen float32 weights of linears in float16 inside the block, and give back the same tensors after it.

    For autocast, which would cast them in every pass. All else, and with it the residual stream, stays float32: sums of
    many layers overflow float16.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if enabled:
            linears = (module for module in model.modules() if isinstance(module, nn.Linear))
            for parameter in {id(p): p for linear in linears for p in linear.parameters()}.values():
                if not parameter.requires_grad and parameter.dtype == torch.float32:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.half()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
