"""One way into all methods and layouts: what a config asks for, done to a model, and its folder written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from burnish.compress.bitsandbytes_format import quantize_codes, save_codes
from burnish.compress.compressed_tensors import save_compressed_tensors
from burnish.compress.config import CODE_METHODS, ROW_METHODS, MixedPrecision, QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.partial import PartialFolder
from burnish.compress.quantize import OnLayer, QuantizeResult, quantize_model
from burnish.compress.sensitivity import OnUnit
from burnish.compress.w8a8 import quantize_output_layer, quantize_w8a8
from burnish.errors import ConfigError
from burnish.models.decoder import Decoder

Save = Callable[[Path, Path], None]
"""Writes the folder (first) of a child, with config.json and companions of its parent's (second)."""


def quantize_for_folder(
    model: Decoder,
    examples: Sequence[Sequence[int]] | None,
    config: QuantizeConfig,
    *,
    mixed: MixedPrecision | None = None,
    on_layer: OnLayer | None = None,
    on_unit: OnUnit | None = None,
    partial: PartialFolder | None = None,
) -> tuple[QuantizeResult, Save]:
    """Quantize a model in place by whatever method the config names.

    Args:
        examples, mixed, on_layer, on_unit, partial: as in `quantize.quantize_model`; w8a8, smoothquant and the methods
            of bitsandbytes are quick and keep nothing in `partial`.

    Returns:
        What was done, and what writes the model, in its state by then, in the config's layout.

    Raises:
        ConfigError: mixed precision with a method that has one width.
        DataError, CompressionError: as the method says.
    """
    if config.method in (*ROW_METHODS, *CODE_METHODS) and mixed is not None:
        raise ConfigError(f"{config.method} has one width for all layers", remedy="Leave the budget out, or use gptq")
    if config.method in CODE_METHODS:
        result, codes = quantize_codes(model, config, on_layer=on_layer)
        return result, lambda folder, source: save_codes(model, codes, folder, source=source, config=config)
    if config.method in ROW_METHODS:
        result = quantize_w8a8(model, examples, config, on_layer=on_layer)
        return result, lambda folder, source: save_compressed_tensors(model, folder, source=source, config=config)
    result = quantize_model(model, examples, config, mixed=mixed, on_layer=on_layer, on_unit=on_unit, partial=partial)

    def save(folder: Path, source: Path) -> None:
        if config.embeddings:
            quantize_output_layer(model)
        write = save_quantized if config.layout == "gptq" else save_compressed_tensors
        write(model, folder, source=source, config=result.config, widths=result.widths)

    return result, save
