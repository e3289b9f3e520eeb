"""Low-rank adapters: which linears carry one, how it starts, and how it is taken off again.

Hu et al., 2021, arXiv:2106.09685; rank-stabilised scaling from Kalajdzievski, 2023, arXiv:2312.03732; weights taken
apart into magnitude and direction from Liu et al., 2024, arXiv:2402.09353 (DoRA). The decoder knows nothing of this: a
`LoraLinear` takes the place of a linear, dense or quantized. Files are in `adapter.py`, the arithmetic in
`lora_function.py` and `dora.py`, several adapters at once in `adapter_sums.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.errors import ConfigError, SettingError
from burnish.models.adapter_files import lora_scale
from burnish.models.linears import get_module, set_module
from burnish.models.peft_names import fused_groups
from burnish.train.dora import dense_weight, row_norms
from burnish.train.lora_function import lora_linear

# R rank, I in features, O out features

ALL_LINEAR = "all-linear"
BLOCK_PREFIX = "model.layers."


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter looks like.

    Attributes:
        rank: columns of B and rows of A.
        alpha: the product B A is scaled by alpha / rank.
        dropout: share of the adapter's inputs zeroed while training.
        target_modules: roles ("q_proj", "down_proj", "lm_head", ...), or "all-linear" for every linear of the blocks.
        rank_stabilized: scale by alpha / sqrt(rank) instead.
        use_dora: train the length of each row of W + B A beside its direction (see `dora.py`).
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    rank_stabilized: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        problems = [
            SettingError(f"LoRA {{{name}}} is out of range", got=getattr(self, name), expected=expected)
            for name, holds, expected in (
                ("rank", self.rank >= 1, "at least 1"),
                ("alpha", 0 < self.alpha < math.inf, "above 0"),
                ("dropout", 0 <= self.dropout < 1, "0 up to, not including, 1"),
            )
            if not holds
        ]
        if not self.target_modules:
            problems.append(
                SettingError("{target_modules} is empty", expected=f'roles such as "q_proj", or "{ALL_LINEAR}"')
            )
        if problems:
            raise SettingError.of(problems)
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                object.__setattr__(self, "target_modules", (self.target_modules,))
        else:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return lora_scale(rank=self.rank, alpha=self.alpha, rank_stabilized=self.rank_stabilized)


class AdaptedLinear(nn.Module):
    """A frozen linear and what adapters add to it.

    Args:
        base: `nn.Linear`, or any module with `in_features`, `out_features` and forward, such as a quantized linear; it
            is frozen. Its forward has to be differentiable in its input.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features = int(base.in_features)  # type: ignore[arg-type]
        self.out_features = int(base.out_features)  # type: ignore[arg-type]

    def merged_weight(self) -> Tensor:
        """(out, in) dense weight with the adapters in it, summed in float32, in the base weight's dtype.

        Raises:
            ConfigError: the base is quantized.
        """
        raise NotImplementedError


class LoraLinear(AdaptedLinear):
    """A frozen linear plus scale * B A; with DoRA, each row of the sum brought to a trained length.

    Dropout falls on the input of A only.

    Args:
        base: as in `AdaptedLinear`.
        config: rank, scale, dropout, and whether it is DoRA.
        a_RI: use this tensor as A (adapters of one fused group share it); a fresh zero tensor otherwise.

    Attributes:
        lora_A, lora_B: (rank, in) and (out, rank), float32.
        lora_magnitude: (out,), float32, the length of each row; None without DoRA.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(self, base: nn.Module, config: LoraConfig, *, a_RI: nn.Parameter | None = None) -> None:
        super().__init__(base)
        self.config = config
        self.scale = config.scale
        device = next(iter([*base.parameters(), *base.buffers()])).device
        if a_RI is None:
            a_RI = nn.Parameter(torch.zeros(config.rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_A = a_RI
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, dtype=torch.float32, device=device))
        self.lora_magnitude = nn.Parameter(self._row_norms()) if config.use_dora else None
        self._kept_gain: tuple[list[tuple[int, int]], Tensor] | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """A, B and the magnitude, where there is one."""
        found = [self.lora_A, self.lora_B]
        return found if self.lora_magnitude is None else [*found, self.lora_magnitude]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.lora_magnitude is None:
            return self._sum(x, self._bias())
        out, bias_O = self._sum(x, None), self._bias()
        out = (out * self._gain()).to(out.dtype)
        return out if bias_O is None else out + bias_O.to(out.dtype)

    def merged_weight(self) -> Tensor:
        """See `AdaptedLinear.merged_weight`."""
        return self.sum_weight().to(self.base.weight.dtype)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def sum_weight(self) -> Tensor:
        """The merged weight in float32: (out, in); raises as `merged_weight`."""
        if not isinstance(self.base, nn.Linear):
            raise quantized_merge_error("a linear", self.base)
        weight_OI = torch.addmm(self.base.weight.float(), self.lora_B, self.lora_A, alpha=self.scale)
        return weight_OI if self.lora_magnitude is None else weight_OI.mul_(self._gain()[:, None])

    def _sum(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x (W + scale * B A)^T, and the base's bias unless it is None here."""
        dropout = self.config.dropout if self.training else 0.0
        if isinstance(self.base, nn.Linear) and not dropout:
            dtype = x.dtype
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
            return lora_linear(x, self.base.weight, bias_O, self.lora_A, self.lora_B, scale=self.scale, dtype=dtype)
        out = self.base(x)
        own_O = self._bias()
        if own_O is not None and bias_O is None:
            out = out - own_O.to(out.dtype)
        low_x = torch.dropout(x, dropout, True) if dropout else x
        low_x = nn.functional.linear(low_x.to(out.dtype), self.lora_A.to(out.dtype))
        return out + nn.functional.linear(low_x, self.lora_B.to(out.dtype)) * self.scale

    def _bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def _gain(self) -> Tensor:
        """What DoRA multiplies each output by: (out,), float32; the norms are constants to the backward pass."""
        assert self.lora_magnitude is not None
        if self.training or torch.is_grad_enabled():
            return self.lora_magnitude / self._row_norms()
        # Generating asks for every token, and the norms cost as much as a forward over `rank` tokens.
        held = (*self.base.parameters(), *self.base.buffers(), self.lora_A, self.lora_B, self.lora_magnitude)
        key = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in held]
        if self._kept_gain is None or self._kept_gain[0] != key:
            self._kept_gain = key, self.lora_magnitude / self._row_norms()
        return self._kept_gain[1]

    def _row_norms(self) -> Tensor:
        """Lengths of the rows of W + scale * B A: (out,), float32, without gradient."""
        with torch.no_grad():
            return row_norms(dense_weight(self.base), self.lora_A, self.lora_B, scale=self.scale)

    def extra_repr(self) -> str:
        dora = ", dora" if self.config.use_dora else ""
        return f"rank={self.config.rank}, scale={self.scale:g}, dropout={self.config.dropout:g}{dora}"


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of every linear, dense or quantized, in the model's order; a carried adapter counts as one."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, (nn.Linear, AdaptedLinear)) or (
            hasattr(module, "in_features") and hasattr(module, "out_features")
        ):
            inside = name + "."
            yield name, module


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The linears that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What adapters train, once each, in the model's order (an A shared by a fused group is listed once)."""
    seen: dict[int, nn.Parameter] = {}
    for module in lora_modules(model).values():
        for parameter in module.trained:
            seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def choose_targets(model: nn.Module, target_modules: tuple[str, ...] | str) -> list[str]:
    """Names of the linears that `target_modules` asks for.

    Raises:
        ConfigError: a role that no linear of the model has.
    """
    names = [name for name, _ in named_linears(model)]
    if target_modules == ALL_LINEAR:
        chosen = [name for name in names if name.startswith(BLOCK_PREFIX)]
        if not chosen:
            raise ConfigError(f'"{ALL_LINEAR}" found no linear under {BLOCK_PREFIX}*', got=", ".join(names) or "none")
        return chosen
    roles = sorted({name.rpartition(".")[2] for name in names})
    for target in target_modules:
        if target not in roles:
            close = difflib.get_close_matches(target, roles, n=1)
            raise ConfigError(
                "no linear has the target role",
                got=repr(target),
                expected=", ".join([*roles, ALL_LINEAR]),
                remedy=f'Did you mean "{close[0]}"?' if close else None,
            )
    return [name for name in names if name.rpartition(".")[2] in target_modules]


def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter on the chosen linears and freeze everything else.

    A starts uniform in +-1/sqrt(in_features) (the kaiming-uniform of a plain linear), drawn in the model's order from
    one generator; B starts at zero, so the model's outputs do not change. Where a family's checkpoint fuses several of
    the chosen linears into one matrix, they share A: that is what one adapter on the fused matrix is.

    Args:
        model: changed in place.
        config: rank, scale, dropout and targets.
        seed: seeds A.

    Returns:
        Names of the linears that carry an adapter now.

    Raises:
        ConfigError: an unknown role, or the model carries an adapter already.
    """
    names = choose_targets(model, config.target_modules)
    place_adapters(model, config, names)
    generator = torch.Generator().manual_seed(seed)
    started: set[int] = set()
    for module in lora_modules(model).values():
        if id(module.lora_A) not in started:
            started.add(id(module.lora_A))
            bound = 1 / math.sqrt(module.in_features)
            fresh = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                module.lora_A.copy_(fresh)
    return names


def place_adapters(model: nn.Module, config: LoraConfig, names: list[str]) -> None:
    """Swap zero adapters in at `names`, share A within fused groups, and freeze all other parameters.

    Raises:
        ConfigError: the model carries an adapter already.
    """
    if lora_modules(model):
        raise ConfigError(
            "the model carries an adapter already", remedy="Merge it first, or load the base without an adapter."
        )
    model.requires_grad_(False)
    group_of = {name: group for group in fused_groups(model) for name in group}
    shared: dict[tuple[str, ...], nn.Parameter] = {}
    for name in names:
        group = group_of.get(name)
        linear = get_module(model, name)
        module = LoraLinear(linear, config, a_RI=None if group is None else shared.get(group))
        if group is not None:
            shared[group] = module.lora_A
        set_module(model, name, module.train(linear.training))


def merge_adapter(model: nn.Module) -> list[str]:
    """Add every adapter to its base weight (summed in float32) and put the plain linears back, in place.

    Returns:
        Names of the linears that were merged.

    Raises:
        ConfigError: the model carries no adapter, or one over quantized weights; nothing is changed then.
    """
    modules = {name: module for name, module in named_linears(model) if isinstance(module, AdaptedLinear)}
    if not modules:
        raise ConfigError("the model carries no adapter to merge")
    for name, module in modules.items():
        if not isinstance(module.base, nn.Linear):
            raise quantized_merge_error(name, module.base)
    for name, module in modules.items():
        linear = module.base
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(module.merged_weight())
        set_module(model, name, linear)
    return list(modules)


def quantized_merge_error(name: str, base: nn.Module) -> ConfigError:
    """Why an adapter over this base cannot be merged, and what to do."""
    return ConfigError(
        f"the adapter of {name} cannot be merged into quantized weights",
        got=type(base).__name__,
        remedy="Load the original, unquantized base with the adapter, merge there, then quantize the result.",
    )
