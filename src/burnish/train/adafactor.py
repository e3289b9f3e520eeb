"""Adafactor: the second moment of a matrix as one row and one column.

Shazeer & Stern, 2018, arXiv:1804.04235, Algorithms 4 and 5, without its relative step size: rates mean what they mean
to AdamW, and an adapter's B, which starts at zero, learns as fast as its A. (torch's own scales the rate by the root
mean square of the weights, which leaves such a B at a thousandth of it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from burnish.train.lion import keep_compiler_out


class Adafactor(torch.optim.Optimizer):
    """Adaptive rates without momentum; state of a matrix (R, C) is R + C numbers, float32.

    Args:
        groups: parameters or groups of them, with `weight_decay` per group if wanted.
        lr: rate of updates whose root mean square is at most `clipping`.
        epsilon: added to squared gradients.
        decay: beta2 of step t is 1 - t ** -decay.
        clipping: an update of a larger root mean square is scaled down to it.
        weight_decay: decoupled; of groups that name none.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        epsilon: float = 1e-30,
        decay: float = 0.8,
        clipping: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "epsilon": epsilon, "decay": decay, "clipping": clipping, "weight_decay": weight_decay}
        keep_compiler_out(torch.optim.Optimizer)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            if grad.ndim > 1:
                state["row"] = torch.zeros_like(grad[..., :1])
                state["column"] = torch.zeros_like(grad[..., :1, :])
            else:
                state["square"] = torch.zeros_like(grad)
        state["step"] += 1
        mixing = state["step"] ** -group["decay"]
        square = grad.square().add_(group["epsilon"])
        if grad.ndim > 1:
            row, column = state["row"], state["column"]
            row.lerp_(square.mean(dim=-1, keepdim=True), mixing)
            column.lerp_(square.mean(dim=-2, keepdim=True), mixing)
            # v = row column / mean(row), so 1 / sqrt(v) = rsqrt(row / mean(row)) rsqrt(column)
            update = grad * (row / row.mean(dim=-2, keepdim=True)).rsqrt_() * column.rsqrt()
        else:
            update = grad * state["square"].lerp_(square, mixing).rsqrt()
        root_mean_square = update.norm() / update.numel() ** 0.5
        update.div_((root_mean_square / group["clipping"]).clamp_(min=1.0))
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])
