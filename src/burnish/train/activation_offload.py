"""Activations that wait for the backward pass in host memory instead of on the card.

Rajbhandari et al., 2021, arXiv:2104.07857 describe it. It costs two copies over the bus for every tensor; checkpointing
costs a forward pass instead, and both together keep block inputs only, on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from burnish.train.lion import local

SMALLEST_BYTES = 1 << 20
"""Smaller tensors stay where they are: a copy would take longer than it frees."""


@contextlib.contextmanager
def activations_on_host(model: nn.Module, *, smallest_bytes: int = SMALLEST_BYTES) -> Iterator[None]:
    """Inside, what autograd saves is copied to pinned host memory, and back when the backward pass wants it.

    Weights and buffers of `model`, which are saved by reference, stay.
    """
    own = {local(tensor).untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        size = tensor.numel() * tensor.element_size()
        if size < smallest_bytes or tensor.untyped_storage().data_ptr() in own:
            return tensor.device, tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, kept = packed
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
