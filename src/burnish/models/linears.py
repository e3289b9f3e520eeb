"""Finding and replacing linears by dotted name: the only way adapters and quantizers enter a decoder."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from burnish.errors import ConfigError


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of this dotted name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"the model has no module {name!r}") from error


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one of this dotted name, in place.

    Raises:
        ConfigError: there is nothing of that name to replace.
    """
    get_module(model, name)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linear_names(model: nn.Module) -> list[str]:
    """Dotted names of all nn.Linear modules, in the order of the forward; a tied output layer is none."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def replace_linears(model: nn.Module, match: Callable[[str, nn.Linear], nn.Module | None]) -> list[str]:
    """Ask `match` for a replacement of every linear and put those it returns in place.

    Args:
        match: called with the dotted name and the linear; returns the new module, or None to leave it.

    Returns:
        The names replaced, in the order of the forward.

    Raises:
        ConfigError: nothing was replaced.
    """
    replaced: list[str] = []
    for name in linear_names(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module = match(name, linear)
        if module is not None and module is not linear:
            set_module(model, name, module)
            replaced.append(name)
    if not replaced:
        roles = sorted({name.rpartition(".")[2] for name in linear_names(model)})
        raise ConfigError("no linear of the model matches", expected=f"some of {', '.join(roles) or 'none left'}")
    return replaced
