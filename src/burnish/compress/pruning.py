"""Zeros in a whole decoder, in place: which linears, in which order, with which inputs, and what it cost them.

The algorithms are in `wanda` and `sparsegpt`; removing heads, channels and layers is in `structured`. Nothing that runs
a model here skips zeros, so that such a child is neither smaller nor faster than its parent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.compress import gptq, sparsegpt
from burnish.compress.calibration import BlockWalk, TokenBatch, block_linears, make_batches
from burnish.compress.prune_config import PruneConfig
from burnish.compress.quantized_weight import check_weight
from burnish.compress.relative_error import relative_error
from burnish.compress.sparsity_masks import lowest, lowest_in_runs, ragged_columns, share_of
from burnish.compress.wanda import wanda_mask
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder

OnPruned = Callable[["PrunedLayer"], None]


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """What one linear (or, removed whole, one block) lost.

    Attributes:
        name: canonical name.
        error: |x (W - P)'| / |x W'| over the calibration tokens, without calibration |W - P| / |W|; of a removed block
            its influence, the mean of 1 - cosine of its input and output.
        sparsity: share of its weights that are zero, or that were removed.
        dense_columns: input features that the pattern left dense, because they fill no whole run of it.
        seconds: time since the layer before it was done.
    """

    name: str
    error: float
    sparsity: float
    dense_columns: int = 0
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """What was done to a model.

    Attributes:
        config: as asked.
        layers: one record per linear, in the order of the forward.
        sparsity: share of the blocks' weights that are zero, or that were removed.
        num_weights: of the blocks' linears, before.
        calibration_tokens: real tokens; 0 without calibration.
        seconds: the whole call.
    """

    config: PruneConfig
    layers: tuple[PrunedLayer, ...]
    sparsity: float
    num_weights: int
    calibration_tokens: int
    seconds: float

    @property
    def dense_columns(self) -> int:
        """Input features left dense by the pattern, over all linears."""
        return sum(layer.dense_columns for layer in self.layers)


class PruneProgress:
    """Collects the records of layers and passes each on."""

    def __init__(self, on_layer: OnPruned | None) -> None:
        self.layers: list[PrunedLayer] = []
        self._on_layer = on_layer
        self._last = self.started = time.perf_counter()

    def report(self, name: str, *, error: float, sparsity: float, dense_columns: int = 0) -> None:
        now = time.perf_counter()
        record = PrunedLayer(
            name=name, error=error, sparsity=sparsity, dense_columns=dense_columns, seconds=now - self._last
        )
        self._last = now
        self.layers.append(record)
        if self._on_layer is not None:
            self._on_layer(record)


@torch.no_grad()
def prune_model(
    model: Decoder,
    examples: Sequence[Sequence[int]] | None,
    config: PruneConfig,
    *,
    on_layer: OnPruned | None = None,
) -> PruneResult:
    """Set weights of every linear of every block to zero, in place.

    With examples, blocks are visited one after another, and each sees the outputs of the pruned blocks before it; a
    linear sees what the pruned ones before it give. Memory beyond the model is the hidden states of the calibration
    tokens, one Hessian and one weight in float32. After an error the model is partly pruned: reload it.

    Args:
        model: changed in place; its mode (train or eval) is restored.
        examples: calibration token ids; magnitude needs none and only measures the errors by them. The same examples in
            the same order give the same result, bit for bit.
        config: of another method than "structured".
        on_layer: called after each linear.

    Raises:
        ConfigError: a method that needs examples without them, or "structured".
        DataError: no calibration tokens, or ids outside the vocabulary.
        CompressionError: nothing to prune, NaN or infinite weights or activations (names the layer), a Hessian that is
            not positive definite.
    """
    if config.is_structured:
        raise ConfigError("structured pruning makes another model", remedy="Call prune_structured.")
    batches = None if examples is None else calibration_batches(model, examples, config)
    if batches is None and config.needs_calibration:
        raise ConfigError(f"{config.method} needs calibration text", remedy="Give it examples, or use magnitude.")
    check_dense(model)
    progress = PruneProgress(on_layer)
    was_training = model.training
    model.eval()
    zeros = total = 0
    try:
        walk = None if batches is None else BlockWalk(model, batches)
        for layer, block in enumerate(model.model.layers):
            linears = block_linears(block)
            groups = [[name] for name in linears] if walk is None else walk.input_groups(layer, block)
            for group in groups:
                hessian_II = None if walk is None else walk.hessian(layer, block, group[0])
                factor_II = None
                if config.method == "sparsegpt" and hessian_II is not None:
                    first = f"model.layers.{layer}.{group[0]}"
                    factor_II = gptq.inverse_factor(hessian_II, damping=config.damping, name=first)
                for name in group:
                    weight, full_name = linears[name].weight, f"model.layers.{layer}.{name}"
                    pruned_OI = pruned_weight(weight, hessian_II, config, full_name, factor=factor_II)
                    error = relative_error(weight, pruned_OI, hessian_II)
                    weight.copy_(pruned_OI)
                    own_zeros = int((weight == 0).sum())
                    progress.report(
                        full_name,
                        error=error,
                        sparsity=own_zeros / weight.numel(),
                        dense_columns=ragged_columns(weight.shape[1], config.pattern),
                    )
                    zeros, total = zeros + own_zeros, total + weight.numel()
            if walk is not None:
                walk.advance(layer, block)
    finally:
        model.train(was_training)
    return PruneResult(
        config=config,
        layers=tuple(progress.layers),
        sparsity=zeros / total,
        num_weights=total,
        calibration_tokens=count_tokens(batches),
        seconds=time.perf_counter() - progress.started,
    )


def check_dense(model: Decoder) -> None:
    """Refuse a model whose blocks hold no dense linears.

    Raises:
        CompressionError: it is quantized.
    """
    if not any(block_linears(block) for block in model.model.layers):
        raise CompressionError(
            "the model has no dense linears in its blocks", remedy="It is quantized; start from its parent"
        )


def calibration_batches(model: Decoder, examples: Sequence[Sequence[int]], config: PruneConfig) -> list[TokenBatch]:
    """Examples as padded batches for this model; raises as `make_batches`."""
    return make_batches(
        examples,
        vocab_size=model.config.vocab_size,
        max_length=model.config.max_position_embeddings,
        batch_tokens=config.batch_tokens,
    )


def count_tokens(batches: Sequence[TokenBatch] | None) -> int:
    """Real tokens of all batches."""
    return sum(int(batch.real_BT.sum()) for batch in batches or ())


def pruned_weight(
    weight: Tensor, hessian: Tensor | None, config: PruneConfig, name: str, *, factor: Tensor | None = None
) -> Tensor:
    """The weight with zeros in it: (out, in), float32; the weight itself is not modified.

    Args:
        factor: `gptq.inverse_factor` of the Hessian, for sparsegpt.

    Raises:
        CompressionError: as `prune_model`.
    """
    check_weight(weight, name)
    if config.method == "sparsegpt":
        assert hessian is not None
        return sparsegpt.prune_weight(
            weight,
            hessian,
            sparsity=config.sparsity,
            pattern=config.pattern,
            damping=config.damping,
            block_size=config.block_size,
            factor=factor,
            name=name,
        )
    if config.method == "wanda":
        assert hessian is not None
        mask_OI = wanda_mask(weight, hessian, sparsity=config.sparsity, pattern=config.pattern, name=name)
    elif config.pattern is not None:
        mask_OI = lowest_in_runs(weight.detach().abs(), config.pattern)
    else:
        assert config.sparsity is not None
        mask_OI = lowest(weight.detach().abs(), share_of(weight.numel(), config.sparsity))
    return weight.detach().float().masked_fill(mask_OI, 0.0)
