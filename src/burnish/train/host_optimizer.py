"""An optimizer whose state never is on the device: gradients come down, updated weights go up.

Ren et al., 2021, arXiv:2101.06840 (ZeRO-Offload). The device holds weights and gradients only; the host holds float32
weights and the state in pinned memory and computes the update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class HostOptimizer(torch.optim.Optimizer):
    """Runs another optimizer over float32 copies of the parameters in host memory.

    The parameters stay what counts: one that was changed by something else (a checkpoint, say) is read anew before the
    next update.

    Args:
        parameters: on a CUDA device, of any float dtype.
        make: makes the optimizer over the copies.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], make: MakeOptimizer) -> None:
        self._pinned = torch.cuda.is_available()
        self._parameters = list(parameters)
        self._copies = [nn.Parameter(self._on_host(parameter)) for parameter in self._parameters]
        with torch.no_grad():
            for parameter, copy in zip(self._parameters, self._copies):
                copy.copy_(parameter)
        self._grads = [self._on_host(parameter) for parameter in self._parameters]
        self._seen = [_identity(parameter) for parameter in self._parameters]
        self.inner = make(self._copies)
        host_of = {id(copy): parameter for copy, parameter in zip(self._copies, self._parameters)}
        groups = [
            {**group, "params": [host_of[id(copy)] for copy in group["params"]]} for group in self.inner.param_groups
        ]
        super().__init__(groups, {})

    def _on_host(self, parameter: Tensor) -> Tensor:
        return torch.empty(parameter.shape, dtype=torch.float32, device="cpu", pin_memory=self._pinned)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            inner.update({name: value for name, value in group.items() if name != "params"})
        for number, (parameter, copy) in enumerate(zip(self._parameters, self._copies)):
            if _identity(parameter) != self._seen[number]:
                copy.copy_(parameter, non_blocking=True)
            if parameter.grad is None:
                copy.grad = None
            else:
                copy.grad = self._grads[number].copy_(parameter.grad, non_blocking=True)
        self._wait()
        self.inner.step()
        for number, (parameter, copy) in enumerate(zip(self._parameters, self._copies)):
            if copy.grad is not None:
                parameter.copy_(copy, non_blocking=True)
            self._seen[number] = _identity(parameter)
        self._wait()
        return loss

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of each parameter: the host's own tensors, in a mapping made anew."""
        held = self.inner.state
        return defaultdict(dict, {p: held[copy] for p, copy in zip(self._parameters, self._copies) if copy in held})

    @state.setter
    def state(self, value: Any) -> None:
        """torch's constructor assigns an empty one; the inner optimizer's counts."""

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, by the parameters' numbers."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        for group, inner in zip(self.param_groups, self.inner.param_groups):
            group.update({name: value for name, value in inner.items() if name != "params"})

    def _wait(self) -> None:
        if self._pinned:
            torch.cuda.synchronize()


def _identity(parameter: Tensor) -> tuple[int, int]:
    """Changes when the values may have: another memory, or written in place."""
    return parameter.data_ptr(), parameter._version
