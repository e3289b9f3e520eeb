"""AdamW over torch's fused kernel, without torch's own class around it.

Loshchilov and Hutter, 2017, arXiv:1711.05101. `torch.optim.AdamW` imports torch's compiler before its first update,
which was seen to take 110 MiB of memory and more than a second (torch 2.13); numbers and state are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from burnish.train.lion import keep_compiler_out, local


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Args:
        groups: parameters or groups of them, with `weight_decay` per group if wanted; CPU or CUDA.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the second moment's root.
        weight_decay: of groups that name none.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        keep_compiler_out(torch.optim.Optimizer)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=local(parameter).device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                found = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
                for one, tensor in zip(lists, found):
                    one.append(local(tensor))
            if lists[0]:
                _update(*lists, group=group)
        return loss


def _update(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    *,
    group: dict[str, Any],
) -> None:
    torch._foreach_add_(steps, 1)  # type: ignore[reportPrivateImportUsage]
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(  # type: ignore[reportPrivateImportUsage]
        weights,
        grads,
        first,
        second,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
