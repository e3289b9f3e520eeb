"""What several tests of the stages need: logits, manifests, an adapter that changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from burnish.models.decoder import Decoder


def logits_of(decoder: Decoder, tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return decoder(torch.tensor(tokens))


def read_manifest_of(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "burnish.json").read_text(encoding="utf-8"))


def spoil(decoder: Decoder, *, scale: float) -> None:
    """Add noise to every linear, in place."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter += scale * torch.randn(parameter.shape, generator=draw)
