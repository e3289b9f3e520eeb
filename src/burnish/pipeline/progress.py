"""How a stage tells whoever watches how far it is. Torch-free."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often; must be cheap."""

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of the work called `label` are finished; `note` is a figure to show beside it."""
        ...


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """Watch nothing."""


def tell_nobody(text: str) -> None:
    """Keep what people should know to oneself: the default of stages that are called from Python."""
