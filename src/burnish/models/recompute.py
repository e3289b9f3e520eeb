"""A block whose activations are not kept but computed again on the way back (Chen et al., 2016, arXiv:1604.06174).

torch.utils.checkpoint does the same, more generally; its first call imports torch's compiler, which was seen to take
110 MiB of memory (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute(run: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """`run(x, *others)`, of which only x is kept for the backward pass; gradients of parameters are added as usual.

    Random numbers are drawn again as they were. `others` get no gradient.
    """
    # Something has to need a gradient, or autograd would never come back here: x does not where embeddings are frozen.
    witness = torch.empty(0, requires_grad=True)
    return _Recomputed.apply(witness, x, run, others)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, witness: Tensor, x: Tensor, run: Callable[..., Tensor], others: tuple[Any, ...]) -> Tensor:
        device = x.device.type
        ctx.run, ctx.others, ctx.device = run, others, device
        ctx.casting = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.random = torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if device == "cuda" else None
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_(ctx.needs_input_grad[1])
        enabled, dtype = ctx.casting
        cpu, cuda = ctx.random
        with torch.random.fork_rng(devices=[x.device] if cuda is not None else []):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, x.device)
            with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled=enabled):
                y = ctx.run(again, *ctx.others)
        torch.autograd.backward(y, grads[0])
        return None, again.grad, None, None
