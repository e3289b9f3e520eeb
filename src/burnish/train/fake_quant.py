"""Training a linear with the weight that it will have in a few bits: low-rank changes of where each weight rounds to.

A weight's place on its group's grid is kept to 1/128 of a step; what is trained is added there, as scale * B A, and
rounded in every forward, with a gradient that passes the rounding as if it were not there (Bengio et al., 2013,
arXiv:1308.3432) and stops at the grid's ends. Low-rank changes on the grid of a quantized start are LR-QAT (Bondarenko
et al., 2024, arXiv:2406.06385); each group's scale is trained too (LSQ, Esser et al., 2020, arXiv:1902.08153), as a
factor. Nothing is lost at the end: the integers and float16 scales of the last forward are what is stored.

The weight is built for every forward and again for the backward pass, which costs a full-rank gradient per linear and
step, as full tuning does; kept are two bytes per weight beside the parent's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.compress.quantized_weight import SCALE_DTYPE, QuantizedWeight, trivial_g_idx
from burnish.errors import ConfigError
from burnish.models.linears import get_module, set_module
from burnish.train.lora import LoraConfig, LoraLinear

# N tokens, R rank, I in features, O out features, G groups

STEPS_PER_LEVEL = 128
"""Places are int16 numbers of such steps, from half a level below the grid to half a level above its 255."""


class FakeQuantLinear(LoraLinear):
    """A linear that computes with (round(places + scale * B A) - zeros) * scales * exp(log_gain), clamped to its bits.

    With B at zero it is exactly the quantized weight that it begins with: places are the parent's weights on that grid,
    moved into the cell of their integer where rounding to nearest would not give it.

    Args:
        base: the parent's linear, dense, frozen; what `parent_computes` brings back.
        config: rank and scale of what is trained; without dropout and DoRA.
        quantized: where to begin.

    Attributes:
        lora_A, lora_B: (rank, in) and (out, rank), float32, in steps of the grid.
        log_gain: (out, groups), float32, logarithm of what each scale is multiplied by.

    Raises:
        ConfigError: dropout, DoRA, a base that is not dense or another shape.
    """

    places: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    def __init__(self, base: nn.Module, config: LoraConfig, quantized: QuantizedWeight) -> None:
        if not isinstance(base, nn.Linear) or config.use_dora or config.dropout:
            raise ConfigError("quantization-aware training needs a dense base, and knows neither dropout nor DoRA")
        if quantized.ints.shape != base.weight.shape:
            raise ConfigError(
                "the quantized weight is of another shape",
                got=tuple(quantized.ints.shape),
                expected=tuple(base.weight.shape),
            )
        super().__init__(base, config)
        self.bits, self.group_size = quantized.bits, quantized.group_size
        self.is_parent = False
        self.register_buffer("zeros", quantized.zeros, persistent=False)
        self.register_buffer("scales", quantized.scales.float(), persistent=False)
        self.register_buffer("groups", quantized.g_idx.long(), persistent=False)
        self.register_buffer("places", _places(base.weight, quantized), persistent=False)
        plain_I = trivial_g_idx(self.in_features, self.group_size).to(self.groups.device)
        self._in_order = bool((self.groups == plain_I).all())
        self.log_gain = nn.Parameter(torch.zeros_like(self.scales))

    @property
    def trained(self) -> list[nn.Parameter]:
        """A, B and the logarithms of the gains."""
        return [self.lora_A, self.lora_B, self.log_gain]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert isinstance(self.base, nn.Linear)
        if self.is_parent:
            return self.base(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        out_NO = _FakeQuant.apply(x_NI, *self.trained, self)
        return out_NO.view(*x.shape[:-1], out_NO.shape[-1])

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The integers, zero points and scales that the forward computes with."""
        ints_OI, _ = self.ints()
        return QuantizedWeight(
            ints=ints_OI.to(torch.uint8),
            scales=self.stored_scales().to(SCALE_DTYPE),
            zeros=self.zeros,
            g_idx=self.groups.to(torch.int32),
            bits=self.bits,
            group_size=self.group_size,
        )

    @torch.no_grad()
    def sum_weight(self) -> Tensor:
        """The weight that the integers stand for, float32: (out, in)."""
        return self.quantized().dequantize()

    def ints(self) -> tuple[Tensor, Tensor]:
        """The integers, (out, in) float32, and whether a weight's place is on the grid at all, (out, in) bool."""
        largest = (1 << self.bits) - 1
        places_OI = self.places.float().div_(STEPS_PER_LEVEL)
        places_OI.addmm_(self.lora_B, self.lora_A, alpha=self.scale)
        inside_OI = (places_OI > -0.5).logical_and_(places_OI < largest + 0.5)
        return places_OI.round_().clamp_(0, largest), inside_OI

    def levels(self) -> tuple[Tensor, Tensor]:
        """The integers less their zero points, and the other of `ints`."""
        ints_OI, inside_OI = self.ints()
        return ints_OI.sub_(self._of_columns(self.zeros.float())), inside_OI

    def stored_scales(self) -> Tensor:
        """Scales with their gains, of float16 values: (out, groups), float32."""
        info = torch.finfo(SCALE_DTYPE)
        scales_OG = (self.scales * self.log_gain.exp()).clamp_(info.smallest_normal * info.eps, info.max)
        return scales_OG.to(SCALE_DTYPE).float()

    def _of_columns(self, values_OG: Tensor) -> Tensor:
        """A group's value for each of its columns: (out, in), or (out, 1) where there is one group."""
        if values_OG.shape[1] == 1:
            return values_OG
        if not self._in_order:
            return values_OG.index_select(1, self.groups)
        return values_OG.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def sum_groups(self, values_OI: Tensor) -> Tensor:
        """Sums over the columns of each group: (out, groups)."""
        groups = self.scales.shape[1]
        if groups == 1:
            return values_OI.sum(dim=1, keepdim=True)
        if not self._in_order:
            return torch.zeros_like(self.scales).index_add_(1, self.groups, values_OI)
        missing = groups * self.group_size - self.in_features
        return nn.functional.pad(values_OI, (0, missing)).unflatten(1, (groups, self.group_size)).sum(dim=2)


def _places(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Where the weights stand, inside the cells of their integers: (out, in), int16."""
    columns = quantized.g_idx.long()
    ints_OI = quantized.ints.float()
    places_OI = weight.detach().float() / quantized.scales.float().index_select(1, columns)
    places_OI += quantized.zeros.float().index_select(1, columns)
    # Just inside: half a step would round to the even neighbour.
    inside = 0.5 - 1 / STEPS_PER_LEVEL
    offsets_OI = (places_OI - ints_OI).clamp_(-inside, inside)
    return ((ints_OI + offsets_OI) * STEPS_PER_LEVEL).round_().to(torch.int16)


class _FakeQuant(torch.autograd.Function):
    """Keeps the input and references; what depends on the places is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, log_gain_OG: Tensor, linear: FakeQuantLinear
    ) -> Tensor:
        ctx.save_for_backward(x_NI, a_RI, b_OR)
        ctx.linear = linear
        levels_OI, _ = linear.levels()
        weight_OI = levels_OI.mul_(linear._of_columns(linear.stored_scales())).to(x_NI.dtype)
        bias_O = linear._bias()
        return nn.functional.linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, a_RI, b_OR = ctx.saved_tensors
        linear: FakeQuantLinear = ctx.linear
        grad_NO = grads[0].to(x_NI.dtype)
        scales_OG = linear.stored_scales()
        scales_OI = linear._of_columns(scales_OG)
        levels_OI, inside_OI = linear.levels()
        grad_x_NI = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ (levels_OI * scales_OI).to(x_NI.dtype)
        grad_OI = (grad_NO.t() @ x_NI).float()
        grad_gain_OG = linear.sum_groups(levels_OI.mul_(grad_OI)).mul_(scales_OG)
        grad_OI = grad_OI.mul_(scales_OI).mul_(inside_OI).mul_(linear.scale)
        return grad_x_NI, b_OR.t() @ grad_OI, grad_OI @ a_RI.t(), grad_gain_OG, None


def fake_quant_modules(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The linears that are trained so, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def attach_fake_quant(
    model: nn.Module, quantized: Mapping[str, QuantizedWeight], config: LoraConfig, *, seed: int
) -> list[str]:
    """Let dense linears compute with quantized weights that can be trained, and freeze everything else.

    A starts as in `lora.attach_lora`, B at zero and gains at one: outputs are those of the quantized weights.

    Args:
        model: the parent, changed in place; `detach_fake_quant` gives it back.
        quantized: by the linears' names.
        config: rank and scale.
        seed: seeds A.

    Returns:
        The names, in the order of `quantized`.

    Raises:
        ConfigError: as `FakeQuantLinear`, or there is no such linear.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in quantized.items():
        linear = get_module(model, name)
        module = FakeQuantLinear(linear, config, weight)
        bound = 1 / math.sqrt(module.in_features)
        fresh_RI = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            module.lora_A.copy_(fresh_RI)
        set_module(model, name, module.train(linear.training))
    return list(quantized)


def detach_fake_quant(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Put the parent's linears back, in place; returns what was trained, by the linears' names."""
    trained: dict[str, QuantizedWeight] = {}
    for name, module in fake_quant_modules(model).items():
        trained[name] = module.quantized()
        set_module(model, name, module.base)
    return trained


@contextlib.contextmanager
def parent_computes(model: nn.Module) -> Iterator[None]:
    """Inside, linears that are trained so compute with the parent's weights."""
    modules = list(fake_quant_modules(model).values())
    for module in modules:
        module.is_parent = True
    try:
        yield
    finally:
        for module in modules:
            module.is_parent = False
