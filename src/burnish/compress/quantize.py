"""Quantizing a whole decoder in place: which linears, in which order, with which inputs, and what it cost them.

The algorithms are in `rtn`, `gptq`, `awq`, `rotation` and `sensitivity`; files are in `gptq_format`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from burnish.compress import awq
from burnish.compress.block_quantizing import quantize_block
from burnish.compress.calibration import BlockWalk, block_linears, make_batches
from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.matching import ParentWalk
from burnish.compress.partial import PartialFolder
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.compress.rotation import rotate_model
from burnish.compress.sensitivity import OnUnit, budget_bits, choose_bits, measure_sensitivity
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.host_memory import trim_heap
from burnish.models.linears import replace_linears

OnLayer = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What one linear lost.

    Attributes:
        name: canonical name of the linear.
        error: |x (W - Q)'| / |x W'| over the calibration tokens, W being what was aimed at (`match_parent` moves it);
            without calibration |W - Q| / |W|.
        seconds: time since the linear before it was done.
    """

    name: str
    error: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was done to a model.

    Attributes:
        config: as asked; with mixed precision its bits are the most frequent ones.
        layers: one record per linear, in the order of the forward.
        bits_per_weight: stored bits (integers, scales, zero points, group indices) per quantized weight.
        num_weights: quantized weights.
        calibration_tokens: real tokens; 0 without calibration.
        seconds: the whole call.
        widths: bits of every linear by canonical name where they were chosen one by one; else empty.
    """

    config: QuantizeConfig
    layers: tuple[LayerError, ...]
    bits_per_weight: float
    num_weights: int
    calibration_tokens: int
    seconds: float
    widths: Mapping[str, int] = field(default_factory=dict)

    def worst(self, count: int = 3) -> tuple[LayerError, ...]:
        """The layers that lost most, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.error, reverse=True)[:count])


@torch.no_grad()
def quantize_model(
    model: Decoder,
    examples: Sequence[Sequence[int]] | None,
    config: QuantizeConfig,
    *,
    mixed: MixedPrecision | None = None,
    on_layer: OnLayer | None = None,
    on_unit: OnUnit | None = None,
    partial: PartialFolder | None = None,
) -> QuantizeResult:
    """Replace every linear of every block by a `GroupQuantizedLinear`, in place.

    Embeddings, norms and the language-model head are not touched. With examples, blocks are visited one after another
    and each sees the outputs of the quantized blocks before it; memory beyond the model is the hidden states of the
    calibration tokens (twice to match the parent), one Hessian and one weight in float32. After an error the model is
    partly quantized: reload it.

    Args:
        model: changed in place; its mode (train or eval) is restored.
        examples: calibration token ids, one list per text, of any lengths; rtn needs none and only measures
            its errors by them. The same examples in the same order give the same result, bit for bit.
        config: what to do.
        mixed: choose each linear's bits by what it costs, instead of the config's; needs examples.
        on_unit: called while that is measured, see `sensitivity.measure_sensitivity`.
        on_layer: called after each linear with its name, its error and its seconds.
        partial: where finished blocks are kept; those that it has taken over already are not quantized again, and the
            result is the same, bit for bit.

    Raises:
        ConfigError: another method than rtn, or mixed precision, without examples; a budget that is too small.
        DataError: no calibration tokens, or ids outside the vocabulary.
        CompressionError: nothing to quantize, NaN or infinite weights or activations (names the layer), a Hessian that
            is not positive definite; a model that cannot be rotated.
    """
    if config.method != "rtn" and examples is None:
        raise ConfigError(f"{config.method} needs calibration text", remedy="Give it examples, or use --method rtn")
    if mixed is not None and examples is None:
        raise ConfigError("mixed precision needs calibration text", remedy="Give it examples")
    blocks = list(model.model.layers)
    if not any(block_linears(block) for block in blocks):
        raise CompressionError(
            "the model has no dense linears in its blocks", remedy="It is quantized already; start from its parent"
        )
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    if config.rotate:
        rotate_model(model)
    widths: dict[str, int] = {}
    if mixed is not None and examples is not None:
        widths = partial.widths if partial is not None and partial.widths is not None else {}
        if not widths:
            widths = _choose_widths(model, examples, config, mixed, on_unit)
            if partial is not None:
                partial.keep_widths(widths)
        config = replace(config, bits=Counter(widths.values()).most_common(1)[0][0])
    walk, parent, num_tokens = None, None, 0
    if examples is not None:
        batches = make_batches(
            examples,
            vocab_size=model.config.vocab_size,
            max_length=model.config.max_position_embeddings,
            batch_tokens=config.batch_tokens,
        )
        num_tokens = sum(int(batch.real_BT.sum()) for batch in batches)
        walk = BlockWalk(model, batches)
        parent = ParentWalk(model, batches) if config.match_parent else None
    progress = _Progress(on_layer)
    stored_bits = num_weights = 0
    try:
        for layer, block in enumerate(blocks):
            prefix = f"model.layers.{layer}."
            inside = {name.removeprefix(prefix): bits for name, bits in widths.items() if name.startswith(prefix)}
            if parent is not None:
                parent.start(layer, block)
            resumed = partial is not None and layer < partial.finished
            if partial is not None and resumed:
                done = partial.restore(layer, block, config, inside)
                progress.repeat(partial.records(layer))
            else:
                if config.scales and walk is not None:
                    awq.scale_block(walk, layer, block, model=model.config, config=config, widths=inside)
                    if parent is not None:
                        parent.rescale(block)
                done = quantize_block(block, layer, prefix, walk, config, inside, parent=parent, report=progress.report)
            if walk is not None:
                walk.advance(layer, block)
            if parent is not None:
                parent.advance()
            _install(model, prefix, done)
            trim_heap()
            if partial is not None and not resumed:
                partial.add(block, [asdict(record) for record in progress.layers[-len(done) :]])
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
        widths=widths,
    )


def _choose_widths(
    model: Decoder,
    examples: Sequence[Sequence[int]],
    config: QuantizeConfig,
    mixed: MixedPrecision,
    on_unit: OnUnit | None,
) -> dict[str, int]:
    """Bits of every linear, measured on as many of the examples as `mixed.tokens` takes."""
    chosen, left = [], mixed.tokens
    for tokens in examples:
        if left > 0 and tokens:
            chosen.append(tokens[:left])
            left -= len(chosen[-1])
    batches = make_batches(
        chosen,
        vocab_size=model.config.vocab_size,
        max_length=model.config.max_position_embeddings,
        batch_tokens=config.batch_tokens,
    )
    units = measure_sensitivity(model, batches, config, mixed, on_unit=on_unit)
    return choose_bits(units, budget_bits(model, units, mixed))


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

    def repeat(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Report linears of a run that was interrupted."""
        for saved in records:
            record = LayerError(name=saved["name"], error=saved["error"], seconds=saved["seconds"])
            self.layers.append(record)
            if self._on_layer is not None:
                self._on_layer(record.name, record.error, record.seconds)
        self._last = time.perf_counter()


def _install(model: Decoder, prefix: str, done: dict[str, QuantizedWeight]) -> None:
    def match(name: str, linear: nn.Linear) -> nn.Module | None:
        if not name.startswith(prefix) or (quantized := done.get(name.removeprefix(prefix))) is None:
            return None
        return GroupQuantizedLinear.from_quantized(quantized, bias=linear.bias)

    replace_linears(model, match)


def _stored_bits(layer: nn.Module) -> int:
    assert isinstance(layer, GroupQuantizedLinear)
    return 8 * sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
