"""SmoothQuant: outliers of a linear's inputs moved into its weight, so that both can be rounded to 8 bits.

Xiao et al., 2022, arXiv:2211.10438. Activations are rounded token by token with one scale: a channel that is a hundred
times larger than the others takes their levels away. Its factor s = max|x| ** alpha / max|w| ** (1 - alpha) is folded
into what makes the input (`channel_scales`). The paper takes one alpha for a model, mostly 0.5; here each place takes
the one whose rounded product, activations and weights alike, comes nearest to the dense one on calibration tokens,
and then the factors go on from there, each for itself, down the slope of the error that rounding is expected to make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from burnish.compress.calibration import BlockWalk, InputSample
from burnish.compress.channel_scales import ScaleSite, fold_scale, positive, scale_sites
from burnish.compress.quantized_weight import check_weight
from burnish.errors import CompressionError
from burnish.kernels.reference import LARGEST
from burnish.models.config import ModelConfig

# N tokens of the sample, I in features, O out features, C channels of what feeds the linears

STEPS = 20
"""Steps between alpha 0 and 1."""
SAMPLED_TOKENS = 1024
SEARCHED_ROWS = 256
"""Rows of each linear that the search multiplies, evenly spread."""
LARGEST_FACTOR = 1024.0
"""Factors stay within this and its inverse."""
REFINING_STEPS = 100
STEP = 0.05
"""Of a factor's logarithm, as Adam takes it (Kingma and Ba, 2014, arXiv:1412.6980)."""


@torch.no_grad()
def smooth_block(
    walk: BlockWalk, layer: int, block: nn.Module, *, model: ModelConfig, alpha: float | None
) -> dict[str, InputSample]:
    """Find and fold the factors of one block, in place; its function stays the same up to rounding in its dtype.

    Args:
        walk: stands before this block; what it kept of the block's attention is forgotten.
        alpha: for every place; None chooses by the error, place by place.

    Returns:
        By linear, what it reads now that the factors are folded.

    Raises:
        CompressionError: NaN or infinite weights; names the layer.
    """
    sites = {site.readers[0]: site for site in scale_sites(model)}
    groups = walk.input_groups(layer, block)
    for name in (name for group in groups for name in group):
        check_weight(block.get_parameter(f"{name}.weight"), f"model.layers.{layer}.{name}")
    samples = walk.samples(layer, block, [group[0] for group in groups], tokens=SAMPLED_TOKENS)
    for name, sample in samples.items():
        if not bool(torch.isfinite(sample.peak_I).all()):
            raise CompressionError(
                f"model.layers.{layer}.{name} is given NaN or infinite activations",
                remedy="Evaluate the parent before compressing it",
            )
    found: list[tuple[ScaleSite, Tensor]] = []
    for group in groups:
        site = sites.get(group[0])
        if site is not None:
            assert set(site.readers) == set(group)
            weights = [block.get_parameter(f"{name}.weight").float() for name in site.readers]
            found.append((site, search_scale(weights, samples[group[0]], site, alpha=alpha)))
    for site, scale_C in found:
        scale_I = site.spread(fold_scale(block, site, scale_C))
        sample = samples[site.readers[0]]
        samples[site.readers[0]] = InputSample(rows_NI=sample.rows_NI / scale_I, peak_I=sample.peak_I / scale_I)
    walk.forget_attention()
    return {name: samples[group[0]] for group in groups for name in group}


def search_scale(
    weights: Sequence[Tensor], sample: InputSample, site: ScaleSite, *, alpha: float | None = None
) -> Tensor:
    """The factors of one place that lose least; all ones when none is better, or of a given alpha.

    Args:
        weights: (out, in) of each reader, float32.
        sample: of what they read.

    Returns:
        (channels of the source,), float32, positive.
    """
    input_C = positive(site.pooled(sample.peak_I))
    largest_I = torch.stack([weight_OI.abs().amax(dim=0) for weight_OI in weights]).amax(dim=0)
    weight_C = positive(site.pooled(largest_I))
    if alpha is not None:
        return _factors(input_C, weight_C, alpha)
    steps = [-(-weight_OI.shape[0] // SEARCHED_ROWS) for weight_OI in weights]
    searched = [weight_OI[::step] for weight_OI, step in zip(weights, steps)]
    x_NI = sample.rows_NI
    wanted = [x_NI @ weight_OI.t() for weight_OI in searched]

    def lost(scale_C: Tensor) -> float:
        scale_I = site.spread(scale_C)
        rounded_NI = rounded_rows(x_NI / scale_I)
        return sum(
            float((rounded_NI @ rounded_rows(weight_OI * scale_I).t() - wanted_NO).square().sum()) * step
            for weight_OI, step, wanted_NO in zip(searched, steps, wanted)
        )

    best_C = torch.ones_like(input_C)
    best = lost(best_C)
    for step in range(STEPS + 1):
        best, best_C = _better(lost, _factors(input_C, weight_C, step / STEPS), best, best_C)
    return _better(lost, refined(best_C, weights, searched, x_NI, site), best, best_C)[1]


def _better(lost: Callable[[Tensor], float], tried_C: Tensor, best: float, best_C: Tensor) -> tuple[float, Tensor]:
    """What loses less; ties change nothing."""
    error = lost(tried_C)
    return (error, tried_C) if error < best else (best, best_C)


def refined(
    scale_C: Tensor, weights: Sequence[Tensor], searched: Sequence[Tensor], x_NI: Tensor, site: ScaleSite
) -> Tensor:
    """Factors of less expected error, by gradient descent on their logarithms.

    A token's step is in proportion to its largest channel, and its error to that step and to the scaled weights:
    sum over n of max (x / s)^2 times the sum of (s w)^2, and the same the other way round for the weights' rows.

    Args:
        scale_C: where to begin.
        weights: (out, in) of each reader.
        searched: some rows of each, whose largest entries stand for those of all.
    """
    x2_NI = x_NI.square()
    w2_OI = torch.cat(list(searched)).square()
    share = sum(weight_OI.shape[0] for weight_OI in weights) / w2_OI.shape[0]
    sum_x2_I = x2_NI.sum(dim=0)
    sum_w2_I = torch.stack([weight_OI.square().sum(dim=0) for weight_OI in weights]).sum(dim=0)
    log_C, first_C, second_C = scale_C.log(), torch.zeros_like(scale_C), torch.zeros_like(scale_C)
    for step in range(1, REFINING_STEPS + 1):
        scale2_I = site.spread((2.0 * log_C).exp())
        peak_N, place_N = (x2_NI / scale2_I).max(dim=1)
        peak_O, place_O = (w2_OI * scale2_I).max(dim=1)
        tokens, rows = float(peak_N.sum()), share * float(peak_O.sum())
        w2_I, x2_I = sum_w2_I * scale2_I, sum_x2_I / scale2_I
        slope_I = tokens * w2_I - rows * x2_I
        slope_I.index_add_(0, place_N, peak_N, alpha=-float(w2_I.sum()))
        slope_I.index_add_(0, place_O, peak_O, alpha=share * float(x2_I.sum()))
        expected = tokens * float(w2_I.sum()) + rows * float(x2_I.sum())
        slope_C = site.pooled(slope_I) / max(expected, torch.finfo(slope_I.dtype).tiny)
        first_C = torch.lerp(slope_C, first_C, 0.9)
        second_C = torch.lerp(slope_C.square(), second_C, 0.999)
        moved_C = (first_C / (1 - 0.9**step)) / ((second_C / (1 - 0.999**step)).sqrt() + 1e-8)
        log_C = log_C - STEP * moved_C
    return _centred(log_C)


def rounded_rows(rows: Tensor) -> Tensor:
    """What 8 bits and a scale make of each row, (rows, in) float32: `int8_linear` does so to tokens and weights."""
    step = rows.abs().amax(dim=1, keepdim=True) / LARGEST
    return (rows / torch.where(step > 0, step, 1.0)).round_().mul_(step)


def product_error(weight: Tensor, rounded: Tensor, sample: InputSample) -> float:
    """|x W' - r(x) Q'| / |x W'| over the sample, r being what rounds activations; 0 where nothing is to be computed.

    Args:
        weight: (out, in), any float dtype.
        rounded: (out, in), what its integers stand for.
    """
    wanted_NO = sample.rows_NI @ weight.float().t()
    norm = float(wanted_NO.norm())
    found_NO = rounded_rows(sample.rows_NI) @ rounded.float().t()
    return float((found_NO - wanted_NO).norm()) / norm if norm > 0 else 0.0


def _factors(input_C: Tensor, weight_C: Tensor, alpha: float) -> Tensor:
    return _centred(input_C.log() * alpha - weight_C.log() * (1.0 - alpha))


def _centred(log_C: Tensor) -> Tensor:
    limit = float(torch.tensor(LARGEST_FACTOR).log())
    return (log_C - log_C.mean()).clamp_(-limit, limit).exp_()
