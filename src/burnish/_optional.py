"""Importing optional dependencies, with an error that names the extra that brings them."""

from __future__ import annotations

import importlib
from types import ModuleType

from burnish.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return `module`, or say which extra installs it.

    Raises:
        MissingExtraError: the module is not installed (exit code 6).
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module.split('.')[0]} is not installed",
            remedy=f"Install it with: pip install 'burnish[{extra}]'",
        ) from error
