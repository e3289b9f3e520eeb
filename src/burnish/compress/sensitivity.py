"""Mixed precision: how much each linear's rounding costs the whole model, and the widths that a budget buys.

Every unit of linears is rounded alone, at every width, while the rest stays dense, and the divergence of the model's
predictions is measured on calibration tokens. The costs of several units are taken to add up. Units are q/k/v, o,
gate/up and down of one layer: programs that fuse the linears of a unit need one width for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.compress import rtn
from burnish.compress.calibration import BlockWalk, TokenBatch, block_linears
from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.gptq_format import can_store, stored_bits
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder

# B sequences, T tokens, V vocabulary

UNITS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
HEADER_BYTES = 160
"""What a safetensors header says of one tensor, at most."""

OnUnit = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class UnitSensitivity:
    """Linears that share a width, and what each width costs.

    Attributes:
        linears: canonical names.
        num_weights: of all of them.
        divergence: mean KL from the dense model in nats per token with only these linears rounded, by bits.
        stored: bits in the file (integers, scales, zero points, group indices), by bits per weight.
    """

    linears: tuple[str, ...]
    num_weights: int
    divergence: Mapping[int, float]
    stored: Mapping[int, int]


@torch.no_grad()
def measure_sensitivity(
    model: Decoder,
    batches: Sequence[TokenBatch],
    config: QuantizeConfig,
    mixed: MixedPrecision,
    *,
    on_unit: OnUnit | None = None,
) -> list[UnitSensitivity]:
    """Round every unit alone at every width and see what the model predicts then.

    Rounding is to nearest on the grid of `config`, whatever method follows: only proportions count. A unit costs one
    run through its block and those behind it per width.

    Args:
        model: dense, in eval mode; unchanged afterwards.
        batches: what to measure on; more tokens, more time.
        on_unit: called after each unit with how many are done and how many there are.

    Raises:
        CompressionError: NaN or infinite weights, or a unit that no width can store.
    """
    walk = BlockWalk(model, batches)
    expected = [model.logits(hidden).log_softmax(-1) for _, hidden in walk.finish(model, 0)]
    units = [(layer, unit) for layer, block in enumerate(model.model.layers) for unit in _units(block)]
    measured: list[UnitSensitivity] = []
    reached = 0
    for layer, unit in units:
        while reached < layer:
            walk.advance(reached, model.model.layers[reached])
            reached += 1
        measured.append(_measure(model, walk, layer, unit, expected, config, mixed))
        if on_unit is not None:
            on_unit(len(measured), len(units))
    return measured


def _units(block: nn.Module) -> Iterator[tuple[str, ...]]:
    names = list(block_linears(block))
    for roles in UNITS:
        unit = tuple(name for name in names if name.rpartition(".")[2] in roles)
        if unit:
            yield unit


def _measure(
    model: Decoder,
    walk: BlockWalk,
    layer: int,
    unit: tuple[str, ...],
    expected: list[Tensor],
    config: QuantizeConfig,
    mixed: MixedPrecision,
) -> UnitSensitivity:
    block = model.model.layers[layer]
    names = tuple(f"model.layers.{layer}.{name}" for name in unit)
    weights = [block.get_parameter(f"{name}.weight") for name in unit]
    dense = [weight.clone() for weight in weights]
    widths = [bits for bits in mixed.choices if all(can_store(model.config, name, bits) for name in names)]
    if not widths:
        raise CompressionError(
            f"{names[0]} can be stored at none of the widths", got=", ".join(map(str, mixed.choices))
        )
    divergence: dict[int, float] = {}
    for bits in widths:
        for name, weight, original in zip(names, weights, dense):
            rounded = rtn.quantize_weight(
                original,
                bits=bits,
                group_size=config.group_size,
                symmetric=config.symmetric,
                scale_search=config.scale_search,
                name=name,
            )
            weight.copy_(rounded.dequantize(dtype=weight.dtype))
        divergence[bits] = _divergence(model, walk, layer, expected)
    for weight, original in zip(weights, dense):
        weight.copy_(original)
    return UnitSensitivity(
        linears=names,
        num_weights=sum(weight.numel() for weight in weights),
        divergence=divergence,
        stored={
            bits: sum(stored_bits(*weight.shape, bits=bits, group_size=config.group_size) for weight in weights)
            for bits in widths
        },
    )


def _divergence(model: Decoder, walk: BlockWalk, layer: int, expected: list[Tensor]) -> float:
    total, count = 0.0, 0
    for (real_BT, hidden), log_p_BTV in zip(walk.finish(model, layer), expected):
        log_q_BTV = model.logits(hidden).log_softmax(-1)
        kl_BT = (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1)
        total += float(kl_BT[real_BT].double().sum())
        count += int(real_BT.sum())
    if total != total:
        raise CompressionError(
            f"the model predicts NaN from layer {layer} on", remedy="Evaluate the parent before compressing it"
        )
    return max(total / count, 0.0)


def budget_bits(model: Decoder, units: Sequence[UnitSensitivity], mixed: MixedPrecision) -> float:
    """What the block linears may take: bits in the file.

    With a largest size, everything else that the weight files hold is taken off first.
    """
    if mixed.target_bits is not None:
        return mixed.target_bits * sum(unit.num_weights for unit in units)
    assert mixed.max_bytes is not None
    state = dict(model.named_parameters())
    rounded = {f"{name}.weight" for unit in units for name in unit.linears}
    fixed = sum(tensor.nbytes for name, tensor in state.items() if name not in rounded)
    headers = HEADER_BYTES * (len(state) + 3 * len(rounded))
    return 8.0 * (mixed.max_bytes - fixed - headers)


def choose_bits(units: Sequence[UnitSensitivity], budget: float) -> dict[str, int]:
    """The width of every linear: least summed divergence found within the budget.

    From the narrowest widths upwards, always the widening that saves most divergence per bit, along the lower convex
    hull of each unit's costs (the Lagrangian solution); what is left over then buys whatever still fits.

    Args:
        budget: bits in the file for all units together.

    Raises:
        ConfigError: even the narrowest widths take more.
    """
    chosen = [min(unit.stored, key=lambda bits, unit=unit: unit.stored[bits]) for unit in units]
    spent = sum(unit.stored[bits] for unit, bits in zip(units, chosen))
    if spent > budget:
        weights = sum(unit.num_weights for unit in units)
        raise ConfigError(
            "the budget is too small for the narrowest weights",
            got=f"{max(budget, 0.0) / weights:.2f} bits per weight for the layers",
            expected=f"at least {spent / weights:.2f}",
            remedy="Allow more bits or bytes, or a larger group size.",
        )
    steps = sorted(
        (step for index, unit in enumerate(units) for step in _hull_steps(index, unit)), key=lambda step: -step[0]
    )
    for _, index, bits in steps:
        extra = units[index].stored[bits] - units[index].stored[chosen[index]]
        if extra > 0 and spent + extra <= budget:
            chosen[index], spent = bits, spent + extra
    while (best := _best_widening(units, chosen, budget - spent)) is not None:
        index, bits = best
        spent += units[index].stored[bits] - units[index].stored[chosen[index]]
        chosen[index] = bits
    return {name: bits for unit, bits in zip(units, chosen) for name in unit.linears}


def _hull_steps(index: int, unit: UnitSensitivity) -> Iterator[tuple[float, int, int]]:
    """(divergence saved per bit stored, unit, bits) of each step along the lower convex hull, slopes falling."""
    left = sorted(unit.stored, key=lambda bits: unit.stored[bits])
    here = left.pop(0)
    while left:
        slope, target = max((_slope(unit, here, bits), bits) for bits in left)
        if slope <= 0.0:
            return
        yield slope, index, target
        left = [bits for bits in left if unit.stored[bits] > unit.stored[target]]
        here = target


def _slope(unit: UnitSensitivity, narrow: int, wide: int) -> float:
    extra = unit.stored[wide] - unit.stored[narrow]
    return (unit.divergence[narrow] - unit.divergence[wide]) / extra


def _best_widening(units: Sequence[UnitSensitivity], chosen: Sequence[int], room: float) -> tuple[int, int] | None:
    """The widening that fits and saves most divergence per bit; None when none saves any."""
    options = [
        (_slope(unit, now, bits), index, bits)
        for index, (unit, now) in enumerate(zip(units, chosen))
        for bits, stored in unit.stored.items()
        if 0 < stored - unit.stored[now] <= room
    ]
    best = max(options, default=None)
    return None if best is None or best[0] <= 0.0 else best[1:]
