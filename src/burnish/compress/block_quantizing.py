"""Quantizing the linears of one block, each from the inputs that it gets in the model that is being made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from burnish.compress import gptq, rtn
from burnish.compress.calibration import BlockWalk, block_linears
from burnish.compress.config import QuantizeConfig
from burnish.compress.matching import ParentWalk, SplitMoments, matched_weight, trusted_share
from burnish.compress.quantized_weight import QuantizedWeight, check_weight
from burnish.compress.refinement import refine_weight
from burnish.compress.relative_error import relative_error

# O out features, I in features


@dataclass(frozen=True, kw_only=True)
class LinearInputs:
    """What calibration tells of the inputs that some linears share.

    Attributes:
        hessian_II: mean of z z' over the calibration tokens.
        inverse: of it; None for methods that correct nothing.
        matched: None where the parent is not matched.
        inverses: of the Hessians of the halves of `matched`.
    """

    hessian_II: Tensor
    inverse: gptq.InverseHessian | None = None
    matched: SplitMoments | None = None
    inverses: tuple[gptq.InverseHessian, ...] = ()


def quantize_block(
    block: nn.Module,
    layer: int,
    prefix: str,
    walk: BlockWalk | None,
    config: QuantizeConfig,
    widths: Mapping[str, int],
    *,
    parent: ParentWalk | None = None,
    report: Callable[[str, float], None],
) -> dict[str, QuantizedWeight]:
    """Quantize one block's linears; their dense weights become what the integers stand for.

    Args:
        prefix: of the canonical names of what the block holds.
        walk: stands before the block; None rounds without calibration.
        widths: bits of linears, by their name in the block, that are not the config's.
        parent: started on this block.
        report: called with each linear's canonical name and its error.
    """
    linears = block_linears(block)
    groups = [[name] for name in linears] if walk is None else walk.input_groups(layer, block)
    at_once = {}
    if walk is not None and not config.true_sequential:
        at_once = walk.hessians(layer, block, [group[0] for group in groups])
    done: dict[str, QuantizedWeight] = {}
    for group in groups:
        for name in group:
            check_weight(linears[name].weight, prefix + name)
        inputs = None
        if walk is not None:
            matched = None if parent is None else parent.moments(walk, block, group[0])
            if matched is not None:
                hessian_II = matched.whole.hessian_II
            else:
                hessian_II = at_once.pop(group[0]) if at_once else walk.hessian(layer, block, group[0])
            inputs = _linear_inputs(hessian_II, matched, config, prefix + group[0])
        for name in group:
            linear = linears[name]
            own = replace(config, bits=widths.get(name, config.bits))
            target_OI, quantized = quantize_linear(linear.weight, inputs, own, prefix + name)
            hessian_II = inputs.hessian_II if inputs else None
            report(prefix + name, relative_error(target_OI, quantized.dequantize(), hessian_II))
            linear.weight.copy_(quantized.dequantize(dtype=linear.weight.dtype))
            done[name] = quantized
    return done


def _linear_inputs(hessian_II: Tensor, matched: SplitMoments | None, config: QuantizeConfig, name: str) -> LinearInputs:
    if not config.corrects:
        return LinearInputs(hessian_II=hessian_II)
    inverse, *inverses = (
        gptq.invert_hessian(each_II, damping=config.damping, activation_order=config.activation_order, name=name)
        for each_II in (hessian_II, *(half.hessian_II for half in (matched.halves if matched else ())))
    )
    return LinearInputs(hessian_II=hessian_II, inverse=inverse, matched=matched, inverses=tuple(inverses))


def quantize_linear(
    weight: Tensor, inputs: LinearInputs | None, config: QuantizeConfig, name: str
) -> tuple[Tensor, QuantizedWeight]:
    """Quantize one weight as the config says; returns the dense weight that was aimed at, (out, in), and the result.

    Args:
        inputs: None for rounding without calibration.
        name: for messages.
    """
    if inputs is None or inputs.inverse is None:
        return weight, rtn.quantize_weight(
            weight,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            scale_search=config.scale_search,
            importance=inputs.hessian_II.diagonal() if config.scales and inputs is not None else None,
            name=name,
        )
    hessian_II, target_OI = inputs.hessian_II, weight
    if inputs.matched is not None:
        first, second = inputs.inverses
        share = trusted_share(weight, inputs.matched.halves, (first, second))
        target_OI = matched_weight(weight, inputs.matched.whole, inputs.inverse, share=share)
    quantized = gptq.quantize_weight(
        target_OI,
        hessian_II,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        scale_search=config.scale_search,
        block_size=config.block_size,
        inverse=inputs.inverse,
        name=name,
    )
    if config.refine:
        quantized = refine_weight(target_OI, hessian_II, quantized, sweeps=config.refine, damping=config.damping)
    return target_OI, quantized
