"""Four-bit weights in blocks that share a scale: NF4 and FP4, with scales that are quantized once more if asked.

Dettmers et al., 2023, arXiv:2305.14314, sections 2 and 3: a block of 64 weights in the matrix's own order (blocks go on
from row to row, the last one may be short) is divided by its largest magnitude and each weight rounded to the nearest
of 16 levels. NF4's levels are quantiles of a normal distribution, FP4's are those of a float with one sign, two
exponent and one fraction bit. Two weights share a byte, the first in the upper half. Double quantization takes the mean
off the blocks' scales and rounds them to the 8-bit dynamic type (Dettmers et al., 2021, arXiv:2110.02861) in blocks
of 256. Codes and values are those of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from burnish.compress.quantized_weight import check_weight
from burnish.errors import ConfigError
from burnish.kernels import training_reference
from burnish.kernels.cpu.training_weights import weight_kernels
from burnish.kernels.training_reference import SCALES_PER_BLOCK

# P pairs of weights (bytes), B blocks, S blocks of scales

BLOCK_SIZE = 64
ROUNDED_AT_ONCE = (1 << 15) - 1
"""They stay in a core's cache, and torch runs so few without waking other threads."""
CELLS = 4096
"""Of the look-up that finds a weight's level; none holds two midpoints between levels."""

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * step / 12 for sign in (1, -1) for step in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
"""The level of each code. FP4 has a zero of either sign."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How weights are stored in four bits.

    Attributes:
        kind: "nf4" or "fp4".
        block_size: weights per scale; even.
        double: scales are stored in 8 bits.
    """

    kind: str = "nf4"
    block_size: int = BLOCK_SIZE
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in LEVELS:
            raise ConfigError("four-bit kind is not known", got=repr(self.kind), expected=", ".join(LEVELS))
        if self.block_size < 2 or self.block_size % 2:
            raise ConfigError("block_size is out of range", got=self.block_size, expected="an even number, 2 or more")

    def num_blocks(self, num_weights: int) -> int:
        """Blocks of so many weights; the last may be short."""
        return -(-num_weights // self.block_size)


@dataclass(frozen=True, kw_only=True)
class BlockScales:
    """The largest magnitude of each block.

    Attributes:
        absmax: (blocks,), float32; or uint8, indices into the dynamic type, when double.
        scale: (blocks of 256 scales,), float32, the largest magnitude among each; None unless double.
        offset: (), float32, the mean that was taken off; None unless double.
    """

    absmax: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None


def quantize_blocks(
    weight: Tensor, block_format: BlockFormat, packed_P: Tensor, *, name: str = "weight"
) -> BlockScales:
    """Round a weight to four bits, in slabs.

    Args:
        weight: any shape and float dtype; not modified.
        packed_P: (ceil(weights / 2),), uint8, filled in place; the spare half of a last odd byte is the code of zero.
        name: the layer, for messages.

    Raises:
        CompressionError: NaN or infinite weights, or no matrix.
    """
    flat = weight.detach().reshape(-1)
    size = block_format.block_size
    absmax_B = torch.empty(block_format.num_blocks(flat.numel()), dtype=torch.float32, device=flat.device)
    slab = max(1, ROUNDED_AT_ONCE // size) * size
    for start in range(0, flat.numel(), slab):
        part = flat[start : start + slab].float()
        short = -part.numel() % size
        blocks_BN = torch.nn.functional.pad(part, (0, short)).view(-1, size)
        peak_B = blocks_BN.abs().amax(dim=1)
        if not bool(torch.isfinite(peak_B).all()):
            check_weight(weight, name)
        absmax_B[start // size : start // size + len(peak_B)] = peak_B
        scaled = (blocks_BN * (1.0 / peak_B.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)
        scaled = scaled[: part.numel() + part.numel() % 2]
        codes = _codes(scaled, block_format.kind)
        packed_P[start // 2 : start // 2 + codes.numel() // 2] = codes[::2] << 4 | codes[1::2]
    return quantize_scales(absmax_B) if block_format.double else BlockScales(absmax=absmax_B)


def quantize_scales(absmax_B: Tensor) -> BlockScales:
    """Round scales to the dynamic type in blocks of 256, their mean taken off (double quantization).

    Args:
        absmax_B: (blocks,), float32; not modified.
    """
    offset = absmax_B.mean()
    short = -absmax_B.numel() % SCALES_PER_BLOCK
    centred_SN = torch.nn.functional.pad(absmax_B - offset, (0, short)).view(-1, SCALES_PER_BLOCK)
    scale_S = centred_SN.abs().amax(dim=1)
    scaled = (centred_SN / torch.where(scale_S > 0, scale_S, 1.0)[:, None]).view(-1)[: absmax_B.numel()]
    levels = dynamic_levels(absmax_B.device)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    return BlockScales(absmax=codes.to(torch.uint8), scale=scale_S, offset=offset)


def dequantize_blocks(packed_P: Tensor, scales: BlockScales, block_format: BlockFormat, out: Tensor) -> Tensor:
    """Fill `out` with the weights that codes and scales stand for: each a product in float32, rounded once.

    Args:
        out: of the weight's shape, a matrix, and of any float dtype; rows may lie apart; returned.
    """
    kernels = weight_kernels(packed_P.device, out.dtype) or training_reference
    return kernels.dequantize_blocks(
        packed_P,
        scales.absmax,
        out,
        levels=LEVELS[block_format.kind],
        block_size=block_format.block_size,
        absmax_levels=dynamic_levels(packed_P.device) if scales.scale is not None else None,
        absmax_scale=scales.scale,
        absmax_offset=scales.offset,
    )


@lru_cache
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 levels of the signed 8-bit dynamic type, ascending, float32.

    A sign, i zeros that say the power of ten, a one, and 6 - i bits for a fraction between 0.1 and 1; 0 and 1 besides.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


def _codes(scaled: Tensor, kind: str) -> Tensor:
    """The code of the nearest level of each of `scaled`, -1..1, float32: uint8."""
    below, midpoint, order = _search_tables(kind, scaled.device)
    cell = _cell(scaled)
    place = below.index_select(0, cell).add_((scaled > midpoint.index_select(0, cell)).view(torch.uint8))
    return place if order is None else order.index_select(0, place.int())


def _cell(scaled: Tensor) -> Tensor:
    """Which of the equal parts of -1..1 each number is in; what counts is that it never falls as the number rises."""
    return (scaled + 1).mul_(CELLS / 2).long()


@lru_cache
def _search_tables(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """How many midpoints between levels lie in lower cells (uint8); the one within each cell (float32, or infinity);
    and the codes of the levels in ascending order (uint8; None: 0, 1, 2, ...)."""
    levels = torch.tensor(LEVELS[kind], dtype=torch.float32)
    # Of two equal levels the lower code comes first: FP4's +0 lies below its -0.
    order = torch.tensor(sorted(range(16), key=lambda code: (float(levels[code]), code)))
    ascending = levels[order]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    cells = _cell(midpoints)
    below = (torch.arange(CELLS + 1)[:, None] > cells).sum(1).to(torch.uint8)
    within = torch.full((CELLS + 1,), torch.inf)
    within[cells] = midpoints
    plain = bool((order.diff() == 1).all())
    return below.to(device), within.to(device), None if plain else order.to(torch.uint8).to(device)
