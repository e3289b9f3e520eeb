"""The dense parent beside the model that is being quantized, to make up for inputs that have changed.

By the time a block is quantized, its inputs carry the errors of the blocks before it. Knowing what the parent reads and
adds at the same tokens, a linear can be fitted to the parent's outputs from the inputs that it will really get
(`matched_weight`). It costs the parent's hidden states, a dense copy of one block, a second forward and the inputs'
moments six times.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.compress.calibration import BlockWalk, TokenBatch, block_linears
from burnish.compress.gptq import InverseHessian
from burnish.models.decoder import Decoder

# N real tokens of one batch, I in features, O out features


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What a linear's fit needs to know of its inputs, as means over calibration tokens, float32.

    Attributes:
        hessian_II: of z z', z being the inputs in the quantized model.
        cross_II: of x z', x being the parent's inputs.
        shift_OI: of d z', d being what the parent's residual stream has more than this one's where the linear's output
            is added to it; None for linears whose output is not added.
    """

    hessian_II: Tensor
    cross_II: Tensor
    shift_OI: Tensor | None = None

    def missing(self, weight_OI: Tensor) -> Tensor:
        """Mean of (W x + d - W z) z', (out, in): what the output lacks, along each input."""
        missing_OI = weight_OI @ (self.cross_II - self.hessian_II)
        return missing_OI if self.shift_OI is None else missing_OI.add_(self.shift_OI)

    def mixed(self, other: Moments, share: float) -> Moments:
        """The means over both sets of tokens, of which `share` are this one's."""
        both = None if self.shift_OI is None or other.shift_OI is None else (other.shift_OI, self.shift_OI)
        return Moments(
            hessian_II=torch.lerp(other.hessian_II, self.hessian_II, share),
            cross_II=torch.lerp(other.cross_II, self.cross_II, share),
            shift_OI=None if both is None else torch.lerp(*both, share),
        )


@dataclass(frozen=True, kw_only=True)
class SplitMoments:
    """Moments over all calibration tokens and over each half of them, to tell what the halves agree on."""

    whole: Moments
    halves: tuple[Moments, Moments]


def matched_weight(weight: Tensor, moments: Moments, inverse: InverseHessian, *, share: float = 1.0) -> Tensor:
    """The dense weight that brings a linear's outputs nearest to its parent's, though its inputs have changed.

    The least-squares answer V to V z = W x + d, drawn to W by the damping. To quantize it, not W, by E[z z'] is the
    objective of GPTAQ (Li et al., 2025, arXiv:2504.02692) and the first step of Qronos (Zhang et al., 2025,
    arXiv:2505.11695); the residual stream's d is an addition.

    Args:
        weight: (out, in), any float dtype; not modified.
        moments: of the linear.
        inverse: of their Hessian.
        share: of the way from W to V to go.

    Returns:
        (out, in), float32.
    """
    weight_OI = weight.detach().float()
    return weight_OI + share * _step(weight_OI, moments, inverse)


def trusted_share(
    weight: Tensor, halves: tuple[Moments, Moments], inverses: tuple[InverseHessian, InverseHessian]
) -> float:
    """How far to go to the matched weight, 0..1: what is best for each half of the tokens along the other half's way.

    With few tokens for many input features the answer follows noise, and this nears zero; with many it nears one.
    """
    weight_OI = weight.detach().float()
    along = across = 0.0
    for fitted, judge in ((0, 1), (1, 0)):
        step_OI = _step(weight_OI, halves[fitted], inverses[fitted])
        along += float((step_OI * halves[judge].missing(weight_OI)).sum())
        across += float((step_OI @ halves[judge].hessian_II).mul_(step_OI).sum())
    return min(1.0, max(0.0, along / across)) if across > 0.0 else 0.0


def _step(weight_OI: Tensor, moments: Moments, inverse: InverseHessian) -> Tensor:
    missing_OI, order_I, factor_II = moments.missing(weight_OI), inverse.order_I, inverse.factor_II
    step_OI = (missing_OI if order_I is None else missing_OI[:, order_I]) @ factor_II.t() @ factor_II
    return step_OI if order_I is None else step_OI[:, torch.argsort(order_I)]


class ParentWalk:
    """Hidden states of the parent over the same calibration tokens, advanced one block at a time.

    Args:
        model: the decoder before anything in it is quantized.
        batches: those of the walk beside which this one goes.
    """

    def __init__(self, model: Decoder, batches: Sequence[TokenBatch]) -> None:
        self._walk = BlockWalk(model, batches)
        self._layer = 0
        self._block = self._scaled = nn.Module()

    def start(self, layer: int, block: nn.Module) -> None:
        """Take a dense copy of a block that is about to be quantized."""
        self._layer = layer
        self._block = self._scaled = deepcopy(block)
        self._walk.input_groups(layer, self._block)

    def rescale(self, block: nn.Module) -> None:
        """Take a second copy of the started block, whose channels have been scaled since, to read inputs from."""
        self._scaled = deepcopy(block)

    def moments(self, walk: BlockWalk, block: nn.Module, name: str) -> SplitMoments:
        """Of one linear of the block and all that read the same; asked for as `BlockWalk.hessian` is.

        Args:
            walk: of the model that is being quantized.
            block: its block.
            name: of the linear, inside the block.
        """
        linear = block_linears(block)[name]
        sums = [_Sums(linear), _Sums(linear)]
        here = walk.inputs_and_residuals(self._layer, block, name)
        there = self._walk.inputs_and_residuals(self._layer, self._scaled, name)
        for (z_NI, residual_NO), (x_NI, parent_NO) in zip(here, there, strict=True):
            middle = z_NI.shape[0] // 2
            for half, tokens in zip(sums, (slice(None, middle), slice(middle, None))):
                half.add(z_NI[tokens], x_NI[tokens])
                if residual_NO is not None and parent_NO is not None:
                    half.add_shift(z_NI[tokens], parent_NO[tokens] - residual_NO[tokens])
        share = sums[0].count / max(1, sums[0].count + sums[1].count)
        first, second = (each.moments() for each in sums)
        return SplitMoments(whole=first.mixed(second, share), halves=(first, second))

    def advance(self) -> None:
        """Go on to the next block, by the block as it was at first; the copies are let go."""
        if self._scaled is not self._block:
            self._walk.forget_attention()
        self._walk.advance(self._layer, self._block)
        self._block = self._scaled = nn.Module()


class _Sums:
    """Moments while they are being summed."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self.count = 0
        self._hessian_II = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self._cross_II = torch.zeros_like(self._hessian_II)
        self._shift_OI: Tensor | None = None

    def add(self, z_NI: Tensor, x_NI: Tensor) -> None:
        self._hessian_II.addmm_(z_NI.t(), z_NI)
        self._cross_II.addmm_(x_NI.t(), z_NI)
        self.count += z_NI.shape[0]

    def add_shift(self, z_NI: Tensor, d_NO: Tensor) -> None:
        if self._shift_OI is None:
            linear = self._linear
            self._shift_OI = torch.zeros(linear.out_features, linear.in_features, device=linear.weight.device)
        self._shift_OI.addmm_(d_NO.t(), z_NI)

    def moments(self) -> Moments:
        """The means; what was summed becomes them."""
        share = 1.0 / max(1, self.count)
        return Moments(
            hessian_II=self._hessian_II.mul_(share),
            cross_II=self._cross_II.mul_(share),
            shift_OI=None if self._shift_OI is None else self._shift_OI.mul_(share),
        )
