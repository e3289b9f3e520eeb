"""Bytes of a training run by component, counted from the tensors themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from burnish.train.lion import local


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, those at the same place once: tied weights are not counted twice."""
    sizes: dict[int, int] = {}
    for tensor in map(local, tensors):
        place, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        sizes[place] = max(size, sizes.get(place, 0))
    return sum(sizes.values())


def component_bytes(
    model: nn.Module, trained: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """Weights (buffers included), gradients (one per trained parameter, of its dtype) and optimizer state, in bytes."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return {
        "weights": storage_bytes([*model.parameters(), *model.buffers()]),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in state),
    }


@dataclass
class SavedBytes:
    """Bytes that autograd kept for the backward pass, weights left out."""

    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


@contextlib.contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd saves inside the block; values are not touched.

    Gradient checkpointing saves its block inputs behind its own hooks, so there the count is a lower bound.
    """
    own = {local(tensor).untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = SavedBytes()
    alive: list[Tensor] = []  # a freed storage's address would be used again and hide the next tensor

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in saved.sizes:
            saved.sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
