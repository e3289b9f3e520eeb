"""One optimizer over several processes.

`WholeOptimizer` divides the state of whole parameters (ZeRO stage 1; Rajbhandari et al., 2019, arXiv:1910.02054,
section 5.1); `PartsOptimizer` updates the parts of parameters that a sharded model holds. The state that they
give and take is that of a single process: a run that two processes saved goes on with one, or with three.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.train.config import TrainConfig
from burnish.train.distributed import Ranks, part_like
from burnish.train.lion import local
from burnish.train.optimizers import STATE_ON_DEVICE, make_optimizer, parameter_groups

AnyOptimizer = torch.optim.Optimizer


def make_sharded_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig, ranks: Ranks) -> AnyOptimizer:
    """The optimizer of `make_optimizer`, divided as `ranks.sharding` says; its state dict is for all ranks to call.

    A divided one is no torch Optimizer, but does what the loop asks of one.

    Raises:
        ConfigError: see `make_optimizer`; or an optimizer that cannot run on parts of a matrix.
    """
    if ranks.alone or ranks.sharding == "none":
        return make_optimizer(parameters, config)
    if ranks.sharding == "zero1":
        return cast(AnyOptimizer, WholeOptimizer(parameters, config, ranks))
    if config.optimizer == "adafactor" or config.optimizer in STATE_ON_DEVICE:
        raise ConfigError(
            f"optimizer {config.optimizer} cannot update parts of a matrix",
            got=f"sharding {ranks.sharding}",
            remedy="Use adamw or lion, or sharding zero1.",
        )
    return cast(AnyOptimizer, PartsOptimizer(parameters, config, ranks))


class _Divided:
    """What both share: parameters in the order in which a single process's optimizer numbers them."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        self.groups = parameter_groups(parameters, config.weight_decay)
        self.parameters: list[nn.Parameter] = [p for group in self.groups for p in group["params"]]
        self.inner: AnyOptimizer | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of this rank's part; learning rates are set here."""
        return [] if self.inner is None else self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parameters, whoever updates them."""
        for parameter in self.parameters:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                local(parameter.grad).zero_()

    def _whole_groups(self) -> list[dict[str, Any]]:
        settings = {k: v for k, v in (self.param_groups or [{}])[0].items() if k not in ("params", "weight_decay")}
        first, groups = 0, []
        for group in self.groups:
            last = first + len(group["params"])
            groups.append({**settings, "weight_decay": group["weight_decay"], "params": list(range(first, last))})
            first = last
        return groups


class WholeOptimizer(_Divided):
    """Each rank updates some of the parameters and sends them to the others.

    Gradients have to be summed already (`Ranks.reduce_gradients`); parameters are the same on every rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(parameters, config, ranks)
        self.owners = _balanced([p.numel() for p in self.parameters], ranks.world_size)
        self.numbers = [number for number, owner in enumerate(self.owners) if owner == ranks.rank]
        if self.numbers:
            self.inner = make_optimizer([self.parameters[number] for number in self.numbers], config)

    @property
    def state(self) -> Any:
        """Of this rank's parameters."""
        return {} if self.inner is None else self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        """Update this rank's parameters, then pass them round."""
        if self.inner is not None:
            self.inner.step()
        works = [
            dist.broadcast(parameter.detach(), src=owner, async_op=True)
            for parameter, owner in zip(self.parameters, self.owners)
        ]
        for work in works:
            work.wait()  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the main rank; elsewhere what was seen of it. To be called by all."""
        own = {} if self.inner is None else self.inner.state_dict()["state"]
        entries: dict[int, Any] = {number: own[place] for place, number in enumerate(self.numbers) if place in own}
        for number, owner in enumerate(self.owners):
            if owner != 0 and self.ranks.rank in (0, owner):
                entry = _handed_over(entries.get(number), owner=owner, ranks=self.ranks)
                if entry is not None:
                    entries[number] = entry
        return {"state": dict(sorted(entries.items())), "param_groups": self._whole_groups()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a whole state, which every rank is given."""
        if self.inner is None:
            return
        saved, whole = self.inner.state_dict(), state_dict["state"]
        saved["state"] = {place: whole[number] for place, number in enumerate(self.numbers) if number in whole}
        self.inner.load_state_dict(saved)


class PartsOptimizer(_Divided):
    """Updates this rank's rows of every parameter; for optimizers that treat each number by itself."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(parameters, config, ranks)
        self.parts = [nn.Parameter(local(parameter.detach())) for parameter in self.parameters]
        self.inner: AnyOptimizer = make_optimizer(self.parts, config)

    @property
    def state(self) -> Any:
        """Of this rank's parts, by whole parameter."""
        held = self.inner.state
        return defaultdict(dict, {p: held[part] for p, part in zip(self.parameters, self.parts) if part in held})

    @torch.no_grad()
    def step(self) -> None:
        """Update the parts in place; the model gathers them in its next forward pass."""
        for parameter, part in zip(self.parameters, self.parts):
            part.data = local(parameter.detach())  # the model may have moved it
            part.grad = None if parameter.grad is None else local(parameter.grad)
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the main rank; to be called by all."""
        entries = {}
        for number, entry in self.inner.state_dict()["state"].items():
            parameter = self.parameters[number]
            whole = {name: self._whole(value, parameter) for name, value in entry.items()}
            if self.ranks.is_main:
                entries[number] = whole
        return {"state": entries, "param_groups": self._whole_groups()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a whole state, which every rank is given."""
        saved = self.inner.state_dict()
        saved["state"] = {
            number: {name: part_like(value, self.parameters[number]) for name, value in entry.items()}
            for number, entry in state_dict["state"].items()
        }
        self.inner.load_state_dict(saved)

    def _whole(self, value: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(value, Tensor) or value.shape != local(parameter).shape or not value.ndim:
            return value
        return self.ranks.full(_as_sharded(value, parameter))


def _as_sharded(part: Tensor, parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """A part for each size: the largest first, to whichever part holds least."""
    loads, owners = [0] * parts, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = min(range(parts), key=lambda part: loads[part])
        loads[owners[place]] += sizes[place]
    return owners


def _handed_over(entry: dict[str, Any] | None, *, owner: int, ranks: Ranks) -> dict[str, Any] | None:
    """A parameter's state, sent by its owner to the main rank; None on the owner."""
    device = ranks.device
    if ranks.rank == owner:
        outline = [
            (name, (value.shape, value.dtype) if isinstance(value, Tensor) else value)
            for name, value in (entry or {}).items()
        ]
        dist.send_object_list([outline], dst=0, device=device)
        for value in (entry or {}).values():
            if isinstance(value, Tensor):
                dist.send(value.to(device).contiguous(), dst=0)
        return None
    received: list[Any] = [None]
    dist.recv_object_list(received, src=owner, device=device)
    taken: dict[str, Any] = {}
    for name, kind in received[0]:
        if isinstance(kind, tuple):
            buffer = torch.empty(kind[0], dtype=kind[1], device=device)
            dist.recv(buffer, src=owner)
            taken[name] = buffer.cpu()
        else:
            taken[name] = kind
    return taken or None
