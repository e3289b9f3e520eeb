"""Bringing a model into memory as the native engine wants it."""

from __future__ import annotations

from pathlib import Path

import torch

from burnish.compress.optimise import Optimised, load_optimised
from burnish.engine.dtype_rule import pick_dtype
from burnish.errors import ConfigError
from burnish.models.checkpoint import read_config
from burnish.models.decoder import Decoder
from burnish.models.loading import config_of, parse_dtype


def load_for_engine(
    folder: Path,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    quantize: str,
    weights_cache: bool,
    allow_pickle: bool,
) -> Optimised:
    """The folder's decoder, in the dtype asked for or by `dtype_rule`, and what was done to its weights.

    Raises:
        ConfigError, CheckpointError: as `load_optimised`.
    """
    hf_config = read_config(folder)
    wanted = pick_dtype(
        dtype,
        num_parameters=config_of(hf_config).num_parameters(),
        stored=parse_dtype("auto", hf_config),
        device=device,
    )
    return load_optimised(
        folder, quantize=quantize, dtype=wanted, device=device, cache=weights_cache, allow_pickle=allow_pickle
    )


def check_same(decoder: Decoder, dtype: str | torch.dtype, device: torch.device) -> None:
    """Make sure that a decoder in memory is what was asked for.

    Raises:
        ConfigError: another dtype or device was asked for.
    """
    wanted = None if dtype == "auto" else parse_dtype(dtype)
    if wanted is not None and wanted != decoder.dtype:
        raise ConfigError("a decoder that is handed in keeps its dtype", got=wanted, expected=decoder.dtype)
    if device.type != "cpu" and device.type != decoder.device.type:
        raise ConfigError("a decoder that is handed in keeps its device", got=device, expected=decoder.device)
