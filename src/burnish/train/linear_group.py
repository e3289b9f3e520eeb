"""Linears that read the same input, with their adapters, as one matrix product forward and one backward.

The frozen weights of a group stand in one matrix with the rows of all A below them: a product with it gives the
outputs and every x A^T at once, and backward the gradient of x through both. The adapters' B stand in one
block-diagonal matrix. Nothing here is recorded by autograd; `fused_block.py` does that.

N positions, I inputs, O outputs of all linears, R ranks of all adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from burnish.train.lora import LoraLinear


@dataclass(frozen=True, eq=False)
class _Part:
    """One linear: where its outputs and its adapter's ranks stand in the group."""

    base: nn.Module
    adapter: LoraLinear | None
    outputs: slice
    ranks: slice

    @property
    def weight(self) -> nn.Parameter | None:
        """The dense weight; None where the base is quantized."""
        return cast(nn.Parameter, self.base.weight) if isinstance(self.base, nn.Linear) else None

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What autograd is told of: A and B, and the weight and the bias of a linear that is trained whole."""
        found = [] if self.adapter is None else [self.adapter.lora_A, self.adapter.lora_B]
        own = [self.weight, self.bias] if self.weight is not None else []
        return found + [value for value in own if isinstance(value, nn.Parameter) and value.requires_grad]


class LinearGroup:
    """Some linears over one input.

    Args:
        linears: `nn.Linear`, `LoraLinear`, or quantized linears that have `dequantized(dtype)`; frozen or not.
        dtype: what is computed in.
    """

    def __init__(self, linears: Sequence[nn.Module], *, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.parts: list[_Part] = []
        outputs = ranks = 0
        for linear in linears:
            adapter = linear if isinstance(linear, LoraLinear) else None
            base = linear if adapter is None else adapter.base
            more_outputs, more_ranks = int(linear.out_features), 0 if adapter is None else adapter.config.rank  # type: ignore[arg-type]
            self.parts.append(
                _Part(base, adapter, slice(outputs, outputs + more_outputs), slice(ranks, ranks + more_ranks))
            )
            outputs, ranks = outputs + more_outputs, ranks + more_ranks
        self.num_inputs, self.num_outputs, self.num_ranks = int(linears[0].in_features), outputs, ranks  # type: ignore[arg-type]
        self.parameters = [parameter for part in self.parts for parameter in part.trained]
        self.device = next(iter([*linears[0].parameters(), *linears[0].buffers()])).device
        self._quantized = any(part.weight is None for part in self.parts)
        self._weight_EI: Tensor | None = None
        self._a_RI = torch.empty(0)
        self._b_OR = torch.empty(0)
        self._bias_E: Tensor | None = None

    @property
    def width(self) -> int:
        """O + R: columns of what `forward` returns."""
        return self.num_outputs + self.num_ranks

    # ---- weights ----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Bring the weights together. Frozen ones of the right dtype move there for good: they are not held twice."""
        with torch.no_grad():
            if not self._quantized:
                weight_EI = torch.empty(self.width, self.num_inputs, dtype=self.dtype, device=self.device)
                for part in self.parts:
                    assert part.weight is not None
                    weight_EI[part.outputs].copy_(part.weight)
                    if part.weight.dtype == self.dtype and not part.weight.requires_grad:
                        part.weight.data = weight_EI[part.outputs]
                self._weight_EI = weight_EI
                self._a_RI = weight_EI[self.num_outputs :]
            else:
                self._a_RI = torch.empty(self.num_ranks, self.num_inputs, dtype=self.dtype, device=self.device)
            self._b_OR = torch.zeros(self.num_outputs, self.num_ranks, dtype=self.dtype, device=self.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what an update has changed: adapters, and weights that are trained."""
        for part in self.parts:
            if part.adapter is not None:
                self._a_RI[part.ranks].copy_(part.adapter.lora_A)
                torch.mul(part.adapter.lora_B, part.adapter.scale, out=(block := torch.empty_like(part.adapter.lora_B)))
                self._b_OR[part.outputs, part.ranks].copy_(block)
            if self._weight_EI is not None and part.weight is not None and part.weight.requires_grad:
                self._weight_EI[part.outputs].copy_(part.weight)
        if any(part.bias is not None for part in self.parts):
            bias_E = torch.zeros(self.width, dtype=self.dtype, device=self.device)
            for part in self.parts:
                if part.bias is not None:
                    bias_E[part.outputs].copy_(part.bias)
            self._bias_E = bias_E

    def _joined(self) -> Tensor:
        """(O + R, I): the weights over all A; quantized ones are rebuilt for this one use."""
        if self._weight_EI is not None:
            return self._weight_EI
        parts = [
            part.weight.to(self.dtype) if part.weight is not None else part.base.dequantized(self.dtype)  # type: ignore[operator]
            for part in self.parts
        ]
        return torch.cat([*parts, self._a_RI])

    # ---- products ---------------------------------------------------------------------------------------------------

    def forward(self, x_NI: Tensor) -> Tensor:
        """(N, O + R): outputs, adapters included, and beside them x A^T, which the backward pass wants again."""
        joined_EI = self._joined()
        if self._bias_E is None:
            out_NE = torch.mm(x_NI, joined_EI.t())
        else:
            out_NE = torch.addmm(self._bias_E, x_NI, joined_EI.t())
        if self.num_ranks:
            out_NE[:, : self.num_outputs].addmm_(out_NE[:, self.num_outputs :], self._b_OR.t())
        return out_NE

    def backward(
        self, grad_NE: Tensor, x_NI: Tensor, h_NR: Tensor, *, want_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of x and of `parameters`.

        Args:
            grad_NE: (N, O + R) whose first O columns hold the outputs' gradient; the others are written.
            x_NI: the input.
            h_NR: x A^T from `forward`.

        Returns:
            (N, I) or None, and one float32 gradient for each of `parameters`.
        """
        grad_NO = grad_NE[:, : self.num_outputs]
        grad_b = grad_a = torch.empty(0)
        if self.num_ranks:
            grad_h_NR = grad_NE[:, self.num_outputs :]
            grad_h_NR.copy_(grad_NO @ self._b_OR)
            grad_b = grad_NO.t() @ h_NR
            grad_a = grad_h_NR.t() @ x_NI
        grad_x_NI = grad_NE @ self._joined() if want_input else None
        grads: list[Tensor] = []
        for part in self.parts:
            if part.adapter is not None:
                grads.append(grad_a[part.ranks].float())
                grads.append(grad_b[part.outputs, part.ranks].float() * part.adapter.scale)
            for parameter in part.trained[0 if part.adapter is None else 2 :]:
                own_NO = grad_NO[:, part.outputs]
                grad = own_NO.t() @ x_NI if parameter.dim() == 2 else own_NO.float().sum(0)
                grads.append(grad.to(parameter.dtype))
        return grad_x_NI, grads
