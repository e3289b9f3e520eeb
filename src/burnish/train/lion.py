"""Lion: the sign of a momentum, one number of state per parameter.

Chen et al., 2023, arXiv:2302.06675, Program 1. Every update has the size of the learning rate, so its rate is three
to ten times smaller than AdamW's, and its weight decay as much larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Lion(torch.optim.Optimizer):
    """Sign momentum with decoupled weight decay.

    Args:
        groups: parameters or groups of them, with `weight_decay` per group if wanted.
        lr: size of every update.
        betas: of the update's interpolation and of the momentum.
        weight_decay: of groups that name none.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        keep_compiler_out(torch.optim.Optimizer)
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; the momentum is float32."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights, grads, momenta = [], [], []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                weights.append(local(parameter))
                grads.append(local(parameter.grad).float())
                momenta.append(local(state["momentum"]))
            if weights:
                self._update(weights, grads, momenta, group)
        return loss

    def _update(self, weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
        rate, (mixing, keeping) = group["lr"], group["betas"]
        directions = torch._foreach_lerp(momenta, grads, 1 - mixing)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_sign_(directions)  # type: ignore[reportPrivateImportUsage]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(weights, directions, alpha=-rate)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(momenta, grads, 1 - keeping)  # type: ignore[reportPrivateImportUsage]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def keep_compiler_out(kind: type) -> None:
    """Let the methods that torch hides from its compiler run as they are, where they would first import it."""
    for method in vars(kind).values():
        hidden = getattr(method, "__wrapped__", None)
        if hidden is not None and not hasattr(hidden, "__dynamo_disable"):
            hidden.__dynamo_disable = hidden
