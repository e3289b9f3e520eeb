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


class WeightScratch:
    """Memory that groups with quantized linears rebuild their matrices in, each for one product."""

    def __init__(self) -> None:
        self._numel = 0
        self._flat: Tensor | None = None

    def reserve(self, numel: int) -> None:
        """Make room for so many numbers when memory is first asked for."""
        self._numel = max(self._numel, numel)

    def matrix(self, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(rows, columns); what was given before is no longer valid."""
        self.reserve(rows * columns)
        flat = self._flat
        if flat is None or flat.numel() < self._numel or flat.dtype != dtype or flat.device != device:
            self._flat = flat = None
            self._flat = flat = torch.empty(self._numel, dtype=dtype, device=device)
        return flat[: rows * columns].view(rows, columns)


class LinearGroup:
    """Some linears over one input.

    Args:
        linears: `nn.Linear`, `LoraLinear`, or quantized linears that have `dequantized(dtype, out_OI=...)`; frozen or
            not.
        dtype: what is computed in.
        scratch: shared with other groups; None is memory of its own.
    """

    def __init__(
        self, linears: Sequence[nn.Module], *, dtype: torch.dtype, scratch: WeightScratch | None = None
    ) -> None:
        self.dtype = dtype
        self.scratch = WeightScratch() if scratch is None else scratch
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
                self.scratch.reserve(self.width * self.num_inputs)
                self._a_RI = torch.empty(self.num_ranks, self.num_inputs, dtype=self.dtype, device=self.device)
            self._b_OR = torch.zeros(self.num_outputs, self.num_ranks, dtype=self.dtype, device=self.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what an update has changed: adapters, and weights that are trained."""
        for part in self.parts:
            if part.adapter is not None:
                self._a_RI[part.ranks].copy_(part.adapter.lora_A)
                torch.mul(part.adapter.lora_B, part.adapter.scale, out=self._b_OR[part.outputs, part.ranks])
            if self._weight_EI is not None and part.weight is not None and part.weight.requires_grad:
                self._weight_EI[part.outputs].copy_(part.weight)
        if any(part.bias is not None for part in self.parts):
            bias_E = torch.zeros(self.width, dtype=self.dtype, device=self.device)
            for part in self.parts:
                if part.bias is not None:
                    bias_E[part.outputs].copy_(part.bias)
            self._bias_E = bias_E

    @torch.no_grad()
    def _joined(self) -> Tensor:
        """(O + R, I): the weights over all A; quantized ones are rebuilt, and valid until the next group's are."""
        if self._weight_EI is not None:
            return self._weight_EI
        joined_EI = self.scratch.matrix(self.width, self.num_inputs, dtype=self.dtype, device=self.device)
        for part in self.parts:
            if part.weight is not None:
                joined_EI[part.outputs].copy_(part.weight)
            else:
                part.base.dequantized(self.dtype, out_OI=joined_EI[part.outputs])  # type: ignore[operator]
        joined_EI[self.num_outputs :].copy_(self._a_RI)
        return joined_EI

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

    def backward_input(self, grad_NE: Tensor) -> Tensor:
        """Gradient of x, (N, I), from that of the outputs in the first O columns; the others are written."""
        if self.num_ranks:
            torch.mm(grad_NE[:, : self.num_outputs], self._b_OR, out=grad_NE[:, self.num_outputs :])
        return grad_NE @ self._joined()

    def backward_weights(self, grad_NE: Tensor, x_NI: Tensor, h_NR: Tensor) -> list[Tensor]:
        """Gradients of `parameters`, float32 for adapters.

        Args:
            grad_NE: as `backward_input` left it.
            x_NI: the input.
            h_NR: x A^T from `forward`.
        """
        grad_NO = grad_NE[:, : self.num_outputs]
        grad_b_RO = grad_a_RI = torch.empty(0)
        if self.num_ranks:
            # Few rows times many columns: the other way round takes a sixth longer.
            grad_b_RO = h_NR.t() @ grad_NO
            grad_a_RI = grad_NE[:, self.num_outputs :].t() @ x_NI
        grads: list[Tensor] = []
        for part in self.parts:
            if part.adapter is not None:
                grads.append(grad_a_RI[part.ranks].float())
                # Written as autograd keeps it, or it would be copied once more.
                grad_b_OR = torch.empty_like(part.adapter.lora_B)
                grads.append(grad_b_OR.copy_(grad_b_RO[part.ranks, part.outputs].t()).mul_(part.adapter.scale))
            for parameter in part.trained[0 if part.adapter is None else 2 :]:
                own_NO = grad_NO[:, part.outputs]
                grad = own_NO.t() @ x_NI if parameter.dim() == 2 else own_NO.float().sum(0)
                grads.append(grad.to(parameter.dtype))
        return grads
