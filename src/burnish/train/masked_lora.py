"""Low-rank adapters that leave a pruned weight's zeros alone: W + mask * scale * B A, with the mask in every step.

A plain adapter fills the zeros; setting them to zero again when it is merged throws away a part of what it learned.
Here the adapter learns what is left of it. The weight is built for every forward, which costs a full-rank gradient per
linear and step, as full tuning does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.errors import ConfigError
from burnish.models.linears import get_module, set_module
from burnish.train.lora import LoraConfig, LoraLinear, attach_lora

# N tokens, R rank, I in features, O out features


class MaskedLoraLinear(LoraLinear):
    """A frozen linear plus scale * B A where its weight is not zero.

    Args:
        base: dense; its zeros are the mask.
        config: rank and scale; without dropout and DoRA.
        a_RI: see `LoraLinear`.

    Raises:
        ConfigError: dropout, DoRA, or a base that is not dense.
    """

    def __init__(self, base: nn.Module, config: LoraConfig, *, a_RI: nn.Parameter | None = None) -> None:
        if not isinstance(base, nn.Linear) or config.use_dora or config.dropout:
            raise ConfigError("a masked adapter needs a dense base, and knows neither dropout nor DoRA")
        super().__init__(base, config, a_RI=a_RI)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        assert isinstance(self.base, nn.Linear)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        out_NO = _MaskedLora.apply(x_NI, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return out_NO.view(*x.shape[:-1], out_NO.shape[-1])

    @torch.no_grad()
    def sum_weight(self) -> Tensor:
        """The merged weight in float32: (out, in), zero wherever the base's is."""
        assert isinstance(self.base, nn.Linear)
        return _masked_sum(self.base.weight, self.lora_A, self.lora_B, self.scale)


def attach_masked_lora(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """As `attach_lora`, with adapters that keep the zeros of their weights; `merge_adapter` takes them off again.

    Raises:
        ConfigError: as `attach_lora`, or a linear that is not dense.
    """
    names = attach_lora(model, config, seed=seed)
    for name in names:
        plain = get_module(model, name)
        assert isinstance(plain, LoraLinear)
        masked = MaskedLoraLinear(plain.base, config, a_RI=plain.lora_A)
        set_module(model, name, masked.train(plain.training))
    return names


def _masked_sum(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """(out, in), float32."""
    weight_OI = weight_OI.float()
    return torch.addmm(weight_OI, b_OR.float(), a_RI.float(), alpha=scale).masked_fill_(weight_OI == 0, 0.0)


class _MaskedLora(torch.autograd.Function):
    """Keeps the input and references to the weights; the masked sum is built again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR)
        ctx.scale = scale
        sum_OI = _masked_sum(weight_OI, a_RI, b_OR, scale).to(x_NI.dtype)
        return nn.functional.linear(x_NI, sum_OI, None if bias_O is None else bias_O.to(x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grads[0].to(x_NI.dtype)
        grad_x_NI = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ _masked_sum(weight_OI, a_RI, b_OR, ctx.scale).to(x_NI.dtype)
        grad_OI = (grad_NO.t() @ x_NI).float().masked_fill_(weight_OI == 0, 0.0).mul_(ctx.scale)
        grad_a_RI = b_OR.float().t() @ grad_OI if ctx.needs_input_grad[3] else None
        grad_b_OR = grad_OI @ a_RI.float().t() if ctx.needs_input_grad[4] else None
        return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None
