"""Quantizing a whole decoder in place: which linears, in which order, with which inputs, and what it cost them.

The algorithms are in `rtn` and `gptq`; files are in `gptq_format`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.compress import gptq, rtn
from burnish.compress.calibration import BlockWalk, block_linears, make_batches
from burnish.compress.config import QuantizeConfig
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.linears import replace_linears

OnLayer = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What one linear lost.

    Attributes:
        name: canonical name of the linear.
        error: |x (W - Q)'| / |x W'| over the calibration tokens; without calibration |W - Q| / |W|.
        seconds: time since the linear before it was done.
    """

    name: str
    error: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was done to a model.

    Attributes:
        config: as asked.
        layers: one record per linear, in the order of the forward.
        bits_per_weight: stored bits (integers, scales, zero points, group indices) per quantized weight.
        num_weights: quantized weights.
        calibration_tokens: real tokens; 0 without calibration.
        seconds: the whole call.
    """

    config: QuantizeConfig
    layers: tuple[LayerError, ...]
    bits_per_weight: float
    num_weights: int
    calibration_tokens: int
    seconds: float

    def worst(self, count: int = 3) -> tuple[LayerError, ...]:
        """The layers that lost most, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:count])


@torch.no_grad()
def quantize_model(
    model: Decoder,
    examples: Sequence[Sequence[int]] | None,
    config: QuantizeConfig,
    *,
    on_layer: OnLayer | None = None,
) -> QuantizeResult:
    """Replace every linear of every block by a `GroupQuantizedLinear`, in place.

    Embeddings, norms and the language-model head are not touched. With examples, blocks are visited one after another
    and each sees the outputs of the quantized blocks before it; memory beyond the model is the hidden states of the
    calibration tokens, one Hessian and one weight in float32. After an error the model is partly quantized: reload it.

    Args:
        model: changed in place; its mode (train or eval) is restored.
        examples: calibration token ids, one list per text, of any lengths; required by gptq, for rtn they only serve to
            measure the errors. The same examples in the same order give the same result, bit for bit.
        config: what to do.
        on_layer: called after each linear with its name, its error and its seconds.

    Raises:
        ConfigError: gptq without examples.
        DataError: no calibration tokens, or ids outside the vocabulary.
        CompressionError: nothing to quantize, NaN or infinite weights or activations (names the layer), a Hessian that
            is not positive definite.
    """
    if config.method == "gptq" and examples is None:
        raise ConfigError("gptq needs calibration text", remedy="Give it examples, or use --method rtn")
    blocks = list(model.model.layers)
    if not any(block_linears(block) for block in blocks):
        raise CompressionError(
            "the model has no dense linears in its blocks", remedy="It is quantized already; start from its parent"
        )
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    walk, num_tokens = None, 0
    if examples is not None:
        batches = make_batches(
            examples,
            vocab_size=model.config.vocab_size,
            max_length=model.config.max_position_embeddings,
            batch_tokens=config.batch_tokens,
        )
        num_tokens = sum(int(batch.real_BT.sum()) for batch in batches)
        walk = BlockWalk(model, batches)
    progress = _Progress(on_layer)
    stored_bits = num_weights = 0
    try:
        for layer, block in enumerate(blocks):
            prefix = f"model.layers.{layer}."
            done = _quantize_block(block, layer, prefix, walk, config, progress)
            if walk is not None:
                walk.advance(layer, block)
            _install(model, prefix, done)
            num_weights += sum(each.ints.numel() for each in done.values())
            stored_bits += sum(_stored_bits(model.get_submodule(prefix + name)) for name in done)
    finally:
        model.train(was_training)
    return QuantizeResult(
        config=config,
        layers=tuple(progress.layers),
        bits_per_weight=stored_bits / num_weights,
        num_weights=num_weights,
        calibration_tokens=num_tokens,
        seconds=time.perf_counter() - started,
    )


class _Progress:
    def __init__(self, on_layer: OnLayer | None) -> None:
        self.layers: list[LayerError] = []
        self._on_layer = on_layer
        self._last = time.perf_counter()

    def report(self, name: str, error: float) -> None:
        now = time.perf_counter()
        record = LayerError(name=name, error=error, seconds=now - self._last)
        self._last = now
        self.layers.append(record)
        if self._on_layer is not None:
            self._on_layer(record.name, record.error, record.seconds)


def _quantize_block(
    block: nn.Module, layer: int, prefix: str, walk: BlockWalk | None, config: QuantizeConfig, progress: _Progress
) -> dict[str, QuantizedWeight]:
    """Quantize one block's linears; their dense weights become what the integers stand for."""
    linears = block_linears(block)
    groups = [[name] for name in linears] if walk is None else walk.input_groups(layer, block)
    done: dict[str, QuantizedWeight] = {}
    for group in groups:
        hessian_II = None if walk is None else walk.hessian(layer, block, group[0])
        for name in group:
            linear = linears[name]
            quantized = _quantize_linear(linear.weight, hessian_II, config, prefix + name)
            progress.report(prefix + name, gptq.output_error(linear.weight, quantized, hessian_II))
            linear.weight.copy_(quantized.dequantize(dtype=linear.weight.dtype))
            done[name] = quantized
    return done


def _quantize_linear(weight: Tensor, hessian_II: Tensor | None, config: QuantizeConfig, name: str) -> QuantizedWeight:
    if config.method == "rtn":
        return rtn.quantize_weight(
            weight,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            scale_search=config.scale_search,
            name=name,
        )
    assert hessian_II is not None
    return gptq.quantize_weight(
        weight,
        hessian_II,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        damping=config.damping,
        activation_order=config.activation_order,
        scale_search=config.scale_search,
        block_size=config.block_size,
        name=name,
    )


def _install(model: Decoder, prefix: str, done: dict[str, QuantizedWeight]) -> None:
    def match(name: str, linear: nn.Linear) -> nn.Module | None:
        if not name.startswith(prefix) or (quantized := done.get(name.removeprefix(prefix))) is None:
            return None
        return GroupQuantizedLinear.from_quantized(quantized, bias=linear.bias)

    replace_linears(model, match)


def _stored_bits(layer: nn.Module) -> int:
    assert isinstance(layer, GroupQuantizedLinear)
    return 8 * sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
