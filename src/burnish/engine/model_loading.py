"""Bringing a model into memory as the native engine wants it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from burnish.compress.optimise import Optimised, OptimiseReport, load_optimised
from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.prompts import TextTokenizer
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import ConfigError
from burnish.models.checkpoint import read_config
from burnish.models.decoder import Decoder
from burnish.models.loading import config_of, parse_dtype, resolve_model


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """What an engine runs.

    Attributes:
        optimised: what loading did to the weights; None for a decoder handed in.
        load_s: seconds that it took.
    """

    decoder: Decoder
    tokenizer: TextTokenizer | None
    optimised: OptimiseReport | None
    load_s: float


def open_model(
    model: str | Path | Decoder,
    *,
    tokenizer: TextTokenizer | None,
    dtype: str | torch.dtype,
    device: torch.device,
    quantize: str,
    weights_cache: bool,
    revision: str | None,
    offline: bool,
    allow_pickle: bool,
) -> EngineModel:
    """Load a folder, bundled name or hub id with its own tokenizer (unless one is given), or take a decoder as it is.

    Raises:
        ConfigError, CheckpointError: an option cannot be honoured, or the model cannot be loaded.
    """
    if isinstance(model, Decoder):
        check_same(model, dtype, device)
        if quantize != "none":
            raise ConfigError("a decoder that is handed in keeps its weights", got=f"quantize {quantize}")
        return EngineModel(decoder=model.eval(), tokenizer=tokenizer, optimised=None, load_s=0.0)
    started = time.perf_counter()
    folder = resolve_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
    loaded = load_for_engine(
        folder, dtype=dtype, device=device, quantize=quantize, weights_cache=weights_cache, allow_pickle=allow_pickle
    )
    return EngineModel(
        decoder=loaded.decoder,
        tokenizer=tokenizer or load_tokenizer(folder),
        optimised=loaded.report,
        load_s=time.perf_counter() - started,
    )


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
