"""A model whose weights are divided among processes, and made whole again.

torch's fully_shard (FSDP; Zhao et al., 2023, arXiv:2304.11277) on every block and on the rest: each rank holds a share
of every parameter's rows, and a block's weights are whole only while it computes ("zero3"), or from its forward pass to
its backward pass ("zero2", which trades memory for half of the traffic).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from burnish.errors import ConfigError
from burnish.models.linears import get_module
from burnish.train.distributed import Ranks


def shard_model(model: Any, ranks: Ranks, *, precision: str) -> None:
    """Divide a decoder's parameters among the ranks, in place; the parameters are other objects afterwards.

    Gradients come out summed over the ranks. `model.hidden` has to run before `model.logits`, and as often on every
    rank.

    Args:
        model: a decoder, the same on every rank, on any device; it moves to the ranks' one block at a time.
        ranks: who takes part.
        precision: what blocks compute in; "float32", or "bfloat16" with float32 shares and sums.

    Raises:
        ConfigError: quantized weights, float16, or too old a torch.
    """
    if any(not buffer.is_floating_point() for buffer in model.buffers()):
        raise ConfigError("quantized weights cannot be sharded", remedy="Use sharding zero1 or none.")
    if precision == "float16":
        raise ConfigError("a sharded model trains in float32 or bfloat16", got=precision)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=ranks.sharding == "zero3")
    # The rest stays whole from `hidden` through `logits` to the backward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_gradients(module)
    register_fsdp_forward_method(model, "hidden")


def unshard_model(model: Any, ranks: Ranks) -> None:
    """Undo `shard_model` in place, one parameter at a time.

    The main rank's parameters are whole afterwards, on its device; the others' are on the meta device, without memory.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    owners: dict[int, list[tuple[str, str]]] = {}
    kept: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, name))
                kept[id(parameter)] = parameter
    for module in list(model.modules()):
        if isinstance(module, FSDPModule):
            _forget(module)
    for key, places in owners.items():
        parameter = kept.pop(key)
        whole = ranks.full(parameter)
        fresh = (
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if whole is None
            else whole.to(ranks.device)
        )
        plain = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for path, name in places:
            (get_module(model, path) if path else model)._parameters[name] = plain
    model.__dict__.pop("hidden", None)


def _sum_gradients(module: Any) -> None:
    """fully_shard averages; the loss is divided by all ranks' labels already."""
    try:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    except AttributeError as error:
        raise ConfigError("this torch cannot sum sharded gradients", got=torch.__version__, expected="2.9") from error


def _forget(module: Any) -> None:
    """Make a module of fully_shard's the plain one again: its hooks and its class are all that it added."""
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    module.__class__ = next(kind for kind in type(module).__mro__[1:] if kind is not FSDPModule)
