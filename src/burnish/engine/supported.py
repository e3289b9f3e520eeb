"""What an engine that is not burnish's own can honour of a request; the rest is refused, never ignored. Torch-free."""

from __future__ import annotations

from dataclasses import fields

from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError

_DEFAULTS = SamplingParams()


def require_supported(params: SamplingParams, supported: frozenset[str], *, engine: str) -> None:
    """Check that everything the parameters ask for is among the `supported` fields.

    Raises:
        RequestError: something else is not at its default; names it.
    """
    for field in fields(SamplingParams):
        value = getattr(params, field.name)
        if field.name not in supported and value != getattr(_DEFAULTS, field.name):
            raise RequestError(
                f"the {engine} engine does not know {field.name}", got=repr(value), remedy="Use --engine native."
            )
