"""AWQ: channels that matter are made larger before rounding, and what feeds them smaller.

Lin et al., 2023, arXiv:2306.00978. For every place of a block where a factor per channel can be folded away
(`channel_scales`), factors a ** p / w ** q are tried, with a the root mean square of the input channel over the
calibration tokens and w the largest weight that reads it, and those are taken whose rounded linears come nearest to
the dense ones in their outputs. The error is measured by the inputs' second moments, (Q - W) H (Q - W)', where the
paper runs the block. What follows is rounding or GPTQ on the ordinary grid: files need to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from burnish.compress import rtn
from burnish.compress.calibration import BlockWalk
from burnish.compress.channel_scales import ScaleSite, fold_scale, positive, scale_sites
from burnish.compress.config import QuantizeConfig
from burnish.compress.quantized_weight import check_weight
from burnish.compress.sparsity_masks import feature_energy
from burnish.models.config import ModelConfig

# O out features, I in features, C channels of what feeds the linears

POWERS = 20
"""Steps between no scaling and scaling by the whole activation."""
SEARCHED_ROWS = 256
"""Rows of each linear that the search rounds, evenly spread: rows are rounded independently of each other."""
LARGEST_FACTOR = 64.0
"""Factors stay within this and its inverse, so that scales stay where float16 is exact."""

Rounder = Callable[[Tensor], Tensor]
"""Rounds rows of a weight, (out, in)."""


@torch.no_grad()
def scale_block(
    walk: BlockWalk,
    layer: int,
    block: nn.Module,
    *,
    model: ModelConfig,
    config: QuantizeConfig,
    widths: Mapping[str, int],
) -> None:
    """Search and fold the factors of one block, in place; its function stays the same up to rounding in its dtype.

    Args:
        walk: stands before this block; what it kept of the block's attention is forgotten.
        config: the grid that the linears will be rounded to.
        widths: bits of the block's linears by name in the block, where they are not the config's.

    Raises:
        CompressionError: NaN or infinite weights or activations; names the layer.
    """
    sites = {site.readers[0]: site for site in scale_sites(model)}
    found: list[tuple[ScaleSite, Tensor]] = []
    for group in walk.input_groups(layer, block):
        site = sites.get(group[0])
        if site is not None:
            assert set(site.readers) == set(group)
            weights = [block.get_parameter(f"{name}.weight").float() for name in site.readers]
            for name, weight_OI in zip(site.readers, weights):
                check_weight(weight_OI, f"model.layers.{layer}.{name}")
            rounders = [_rounder(replace(config, bits=widths.get(name, config.bits))) for name in site.readers]
            hessian_II = walk.hessian(layer, block, group[0])
            feature_energy(hessian_II, f"model.layers.{layer}.{group[0]}")
            found.append((site, search_scale(weights, hessian_II, site, rounders=rounders)))
    for site, scale_C in found:
        fold_scale(block, site, scale_C)
    walk.forget_attention()


def search_scale(
    weights: Sequence[Tensor], hessian_II: Tensor, site: ScaleSite, *, rounders: Sequence[Rounder]
) -> Tensor:
    """The factors of one site that lose least; all ones when none is better.

    Args:
        weights: (out, in) of each reader, float32.
        hessian_II: (in, in), mean of x x' over the calibration tokens.
        rounders: what rounds each reader; called with some rows of the scaled weight.

    Returns:
        (channels of the source,), float32, positive.
    """
    steps = [-(-weight_OI.shape[0] // SEARCHED_ROWS) for weight_OI in weights]
    weights = [weight_OI[::step] for weight_OI, step in zip(weights, steps)]
    best_C, best = torch.ones_like(site.pooled(hessian_II.diagonal())), float("inf")
    for scale_C in _candidates(weights, hessian_II, site):
        scale_I = site.spread(scale_C)
        lost = 0.0
        for weight_OI, step, round_weight in zip(weights, steps, rounders):
            rounded_OI = round_weight(weight_OI * scale_I) / scale_I
            lost_OI = rounded_OI - weight_OI
            lost += float((lost_OI @ hessian_II).mul_(lost_OI).sum()) * step
        if lost < best:
            best, best_C = lost, scale_C
    return best_C


def _candidates(weights: Sequence[Tensor], hessian_II: Tensor, site: ScaleSite) -> Iterator[Tensor]:
    """No scaling first, so that ties change nothing; then each power of the inputs, without and with the weights'."""
    input_C = positive(site.pooled(hessian_II.diagonal()).sqrt())
    largest_I = torch.stack([weight_OI.abs().amax(dim=0) for weight_OI in weights]).amax(dim=0)
    weight_C = positive(site.pooled(largest_I))
    for step in range(POWERS + 1):
        power = step / POWERS
        for inverse in (0.0, 1.0 - power) if step < POWERS else (0.0,):
            yield _centred(input_C.log() * power - weight_C.log() * inverse)


def _centred(log_scale_C: Tensor) -> Tensor:
    limit = float(torch.tensor(LARGEST_FACTOR).log())
    return (log_scale_C - log_scale_C.mean()).clamp_(-limit, limit).exp_()


def _rounder(config: QuantizeConfig) -> Rounder:
    # Over the whole range: a search for each group's scale costs ten times as much here and finds no better factors.
    def round_weight(weight_OI: Tensor) -> Tensor:
        return rtn.quantize_weight(
            weight_OI,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
        ).dequantize()

    return round_weight
