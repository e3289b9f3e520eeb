"""A decoder whose linears multiply 8-bit integers, weights per output feature and activations per token (W8A8).

Every linear of the blocks becomes an `Int8Linear`, which the engines run on integers. "smoothquant" moves outliers of
the activations into the weights before (`smoothquant`), for which it needs text; "w8a8" needs none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from burnish.compress.calibration import BlockWalk, InputSample, block_linears, make_batches
from burnish.compress.config import QuantizeConfig
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.quantize import LayerError, OnLayer, QuantizeResult
from burnish.compress.quantized_weight import check_weight
from burnish.compress.relative_error import relative_error
from burnish.compress.rotation import rotate_model
from burnish.compress.smoothquant import product_error, smooth_block
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.linears import set_module

OUTPUT_LAYER = "lm_head"


@torch.no_grad()
def quantize_w8a8(
    model: Decoder,
    examples: Sequence[Sequence[int]] | None,
    config: QuantizeConfig,
    *,
    on_layer: OnLayer | None = None,
) -> QuantizeResult:
    """Replace every linear of every block by an `Int8Linear`, in place, and the output layer too with `embeddings`.

    Blocks are visited one after another, each seeing the outputs of the rounded blocks before it. Memory beyond the
    model is the hidden states of the calibration tokens and what a block's linears read of one to two thousand of them.
    Errors are those of the product, activations rounded too; of the weights alone without examples and for the output
    layer.

    Args:
        model: changed in place; its mode is restored. After an error it is partly quantized: reload it.
        examples: calibration token ids, one list per text; None for w8a8.
        config: of method "smoothquant" or "w8a8".
        on_layer: called after each linear with its name, its error and its seconds.

    Raises:
        ConfigError: smoothquant without examples.
        DataError: no calibration tokens, or ids outside the vocabulary.
        CompressionError: nothing to quantize, NaN or infinite weights or activations (names the layer).
    """
    if config.method == "smoothquant" and examples is None:
        raise ConfigError("smoothquant needs calibration text", remedy="Give it examples, or use --method w8a8")
    blocks = list(model.model.layers)
    if not any(block_linears(block) for block in blocks):
        raise CompressionError(
            "the model has no dense linears in its blocks", remedy="It is quantized already; start from its parent"
        )
    started = last = time.perf_counter()
    was_training = model.training
    model.eval()
    if config.rotate:
        rotate_model(model)
    walk, num_tokens = None, 0
    if config.method == "smoothquant" and examples is not None:
        batches = make_batches(
            examples,
            vocab_size=model.config.vocab_size,
            max_length=model.config.max_position_embeddings,
            batch_tokens=config.batch_tokens,
        )
        num_tokens = sum(int(batch.real_BT.sum()) for batch in batches)
        walk = BlockWalk(model, batches)
    layers: list[LayerError] = []

    def report(name: str, error: float) -> None:
        nonlocal last
        now = time.perf_counter()
        layers.append(LayerError(name=name, error=error, seconds=now - last))
        last = now
        if on_layer is not None:
            on_layer(name, error, layers[-1].seconds)

    weights = rows = 0
    try:
        for layer, block in enumerate(blocks):
            prefix = f"model.layers.{layer}."
            samples: dict[str, InputSample] = {}
            if walk is not None:
                samples = smooth_block(walk, layer, block, model=model.config, alpha=config.alpha)
            done: dict[str, Int8Linear] = {}
            for name, linear in block_linears(block).items():
                done[prefix + name] = Int8Linear.from_linear(linear, name=prefix + name)
                rounded_OI = done[prefix + name].dequantize()
                report(prefix + name, _error(linear, rounded_OI, samples.get(name)))
                weights += linear.weight.numel()
                rows += linear.out_features
                linear.weight.copy_(rounded_OI)
            if walk is not None:
                walk.advance(layer, block)
            for name, rounded in done.items():
                set_module(model, name, rounded)
        if config.embeddings:
            for name, error in quantize_output_layer(model).items():
                report(name, error)
    finally:
        model.train(was_training)
    return QuantizeResult(
        config=config,
        layers=tuple(layers),
        bits_per_weight=8.0 + 32.0 * rows / weights,
        num_weights=weights,
        calibration_tokens=num_tokens,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def quantize_output_layer(model: Decoder) -> dict[str, float]:
    """Put the output layer in 8 bits, in place; returns its name and its error, or nothing where it is the embedding.

    A tied output layer is written with the embedding and read back as a layer of its own.

    Raises:
        CompressionError: NaN or infinite weights.
    """
    head = model.lm_head
    if head is None:
        check_weight(model.model.embed_tokens.weight, "model.embed_tokens")
        return {}
    rounded = Int8Linear.from_linear(head, name=OUTPUT_LAYER)
    error = _error(head, rounded.dequantize(), None)
    model.lm_head = rounded  # pyright: ignore[reportAttributeAccessIssue]
    return {OUTPUT_LAYER: error}


def _error(linear: nn.Linear, rounded_OI: torch.Tensor, sample: InputSample | None) -> float:
    if sample is not None:
        return product_error(linear.weight, rounded_OI, sample)
    return relative_error(linear.weight, rounded_OI, None)
