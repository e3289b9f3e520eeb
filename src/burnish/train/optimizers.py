"""The optimizers by name, each with its groups: weight decay falls on matrices only.

What each of them computes is in torch, in bitsandbytes, in `lion.py` and in `adafactor.py`; keeping the state in host
memory is in `host_optimizer.py`, dividing it among processes in `sharded_optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from burnish._optional import require
from burnish.errors import ConfigError
from burnish.train.adafactor import Adafactor
from burnish.train.adamw import AdamW
from burnish.train.config import TrainConfig
from burnish.train.host_optimizer import HostOptimizer
from burnish.train.lion import Lion

STATE_ON_DEVICE = ("adamw-8bit", "paged-adamw-8bit")  # bitsandbytes': CUDA only, and not to be offloaded
LION_BETAS, ADAM_BETAS = (0.9, 0.99), (0.9, 0.999)


def check_device(name: str, device: torch.device | str, *, offload: bool) -> None:
    """Refuse an optimizer that cannot run on the device.

    Raises:
        ConfigError: the optimizer, or offloading its state, needs CUDA; or the two exclude each other.
    """
    kind = torch.device(device).type
    if name in STATE_ON_DEVICE and kind != "cuda":
        raise ConfigError(
            f"optimizer {name} runs on CUDA devices only",
            got=kind,
            remedy="Use adafactor or lion, which keep little state too.",
        )
    if offload and kind != "cuda":
        raise ConfigError(
            "optimizer state is offloaded from CUDA devices only", got=kind, remedy="Leave --offload-optimizer out."
        )
    if offload and name in STATE_ON_DEVICE:
        raise ConfigError(
            f"optimizer {name} keeps its state on the device",
            remedy="Offload adamw, adafactor or lion; paged-adamw-8bit pages its state out by itself.",
        )


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over `parameters` (all on one device).

    "adamw": Loshchilov & Hutter, 2017, arXiv:1711.05101, fused. "adamw-8bit" and "paged-adamw-8bit": its moments in
    blocks of 8 bits (Dettmers et al., 2021, arXiv:2110.02861), from bitsandbytes; tensors below 4,096 values keep
    float32. "adafactor" and "lion": see their classes. State is in plain tensors and numbers, float32 where not said
    otherwise.

    Raises:
        ConfigError: see `check_device`.
        MissingExtraError: bitsandbytes is not installed.
    """
    parameters = list(parameters)
    check_device(config.optimizer, parameters[0].device, offload=config.offload_optimizer)
    if config.offload_optimizer:
        return HostOptimizer(parameters, lambda copies: _make(copies, config))
    return _make(parameters, config)


def _make(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    groups, rate = parameter_groups(parameters, config.weight_decay), config.learning_rate
    if config.optimizer == "lion":
        return Lion(groups, lr=rate, betas=config.betas or LION_BETAS)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=rate, epsilon=1e-30 if config.epsilon is None else config.epsilon)
    betas, epsilon = config.betas or ADAM_BETAS, 1e-8 if config.epsilon is None else config.epsilon
    if config.optimizer == "adamw":
        if parameters[0].device.type in ("cpu", "cuda"):
            return AdamW(groups, lr=rate, betas=betas, eps=epsilon)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon)
    library = require("bitsandbytes", extra="qlora")
    kind = library.optim.AdamW8bit if config.optimizer == "adamw-8bit" else library.optim.PagedAdamW8bit
    return kind(groups, lr=rate, betas=betas, eps=epsilon)


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, then vectors, which no decay falls on; a group without parameters is left out."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
