"""Rotary positions: frequencies with their published scalings, the tables of one forward, and the rotation.

Su et al., 2021, arXiv:2104.09864. Frequencies and angles are float32 whatever the model's dtype.

Shapes: B sequences, T tokens, H heads, E head dim, R rotated dims, F = R / 2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.models.config import ModelConfig


@dataclass(frozen=True)
class RopeTable:
    """cos and sin of one forward's positions, (B or 1, T, 1, F), ready to multiply (B, T, H, F)."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def rotate(self, x_BTHE: Tensor) -> Tensor:
        """Rotate the first R dims of every head; the others pass through."""
        rotary_dim = 2 * self.cos.shape[-1]
        x = x_BTHE[..., :rotary_dim]
        if self.interleaved:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = x.chunk(2, dim=-1)
        rotated = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        x = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        return x if rotary_dim == x_BTHE.shape[-1] else torch.cat((x, x_BTHE[..., rotary_dim:]), dim=-1)


class Rope:
    """The rotation of one kind of layer. Holds no state but cached frequencies."""

    def __init__(
        self,
        *,
        rotary_dim: int,
        theta: float,
        max_position_embeddings: int,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
    ) -> None:
        self.rotary_dim = rotary_dim
        self.theta = theta
        self.max_position_embeddings = max_position_embeddings
        self.scaling = scaling
        self.interleaved = interleaved
        self.needs_length = scaling is not None and scaling["rope_type"] in ("dynamic", "longrope")
        self._cache: dict[tuple[torch.device, int], tuple[Tensor, float]] = {}
        if not self.needs_length:
            self._cache[torch.device("cpu"), 0] = self.frequencies()

    def table(self, positions_BT: Tensor, *, dtype: torch.dtype, lengths_BT: Tensor | None = None) -> RopeTable:
        """cos and sin for these positions, computed in float32 and rounded to `dtype` once.

        Args:
            lengths_BT: tokens of the sequence that each position is rotated in, for the rules that look at it; one
                more than the largest position of all when None.
        """
        if self.needs_length and lengths_BT is not None:
            lengths, which_BT = lengths_BT.unique(return_inverse=True)
            pairs = [self._frequencies_on(positions_BT.device, length) for length in lengths.tolist()]
            frequencies = torch.stack([frequencies_F for frequencies_F, _ in pairs])[which_BT]
            factor = torch.tensor([factor for _, factor in pairs], device=which_BT.device)[which_BT][..., None, None]
        else:
            length = int(positions_BT.max()) + 1 if self.needs_length else 0
            frequencies, factor = self._frequencies_on(positions_BT.device, length)
        angles = (positions_BT[..., None].float() * frequencies)[..., None, :]
        return RopeTable((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype), self.interleaved)

    def _frequencies_on(self, device: torch.device, length: int) -> tuple[Tensor, float]:
        if self.needs_length:
            length = self._bucket(length)
        key = (device, length)
        if key not in self._cache:
            if len(self._cache) > 8:
                self._cache.clear()
            frequencies, factor = self.frequencies(length)
            self._cache[key] = (frequencies.to(device), factor)
        return self._cache[key]

    def _bucket(self, length: int) -> int:
        assert self.scaling is not None
        if self.scaling["rope_type"] == "dynamic":
            return max(length, self.max_position_embeddings)
        limit = self.scaling["original_max_position_embeddings"]
        return limit + 1 if length > limit else limit

    def frequencies(self, length: int = 0) -> tuple[Tensor, float]:
        """(F,) float32 angles per token, on the CPU, and the factor on cos and sin.

        Args:
            length: how many tokens the sequence has so far; only the rules that adapt to it look at it.
        """
        exponents_F = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        plain_F = 1.0 / self.theta**exponents_F
        if self.scaling is None:
            return plain_F, 1.0
        scaling = self.scaling
        if scaling["rope_type"] == "linear":
            return plain_F / scaling["factor"], 1.0
        if scaling["rope_type"] == "llama3":
            return _llama3(plain_F, scaling), 1.0
        if scaling["rope_type"] == "dynamic":
            limit = self.max_position_embeddings
            growth = scaling["factor"] * max(length, limit) / limit - (scaling["factor"] - 1)
            theta = self.theta * growth ** (self.rotary_dim / (self.rotary_dim - 2))
            return 1.0 / theta**exponents_F, 1.0
        if scaling["rope_type"] == "yarn":
            return self._yarn(plain_F, scaling)
        return self._longrope(plain_F, scaling, length)

    def _yarn(self, plain_F: Tensor, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
        """Peng et al., 2023, arXiv:2309.00071: slow rotations are interpolated, fast ones kept, with a ramp between."""
        limit = scaling["original_max_position_embeddings"]
        factor = scaling.get("factor") or self.max_position_embeddings / limit

        def dim_of(rotations: float) -> float:
            wavelengths = math.log(limit / (rotations * 2 * math.pi))
            return self.rotary_dim * wavelengths / (2 * math.log(self.theta))

        low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        span = high - low if high != low else 0.001
        steps_F = torch.arange(self.rotary_dim // 2, dtype=torch.float32, device="cpu")
        ramp_F = ((steps_F - low) / span).clamp(0, 1)
        return plain_F / factor * ramp_F + plain_F * (1 - ramp_F), _yarn_factor(scaling, factor)

    def _longrope(self, plain_F: Tensor, scaling: Mapping[str, Any], length: int) -> tuple[Tensor, float]:
        """Ding et al., 2024, arXiv:2402.13753: one divisor per frequency, short or long by the sequence's length."""
        limit = scaling["original_max_position_embeddings"]
        divisors = scaling["long_factor"] if length > limit else scaling["short_factor"]
        growth = scaling.get("factor") or self.max_position_embeddings / limit
        factor = scaling.get("attention_factor")
        if factor is None:
            factor = 1.0 if growth <= 1.0 else math.sqrt(1 + math.log(growth) / math.log(limit))
        return plain_F / torch.tensor(divisors, dtype=torch.float32, device="cpu"), float(factor)


def _llama3(plain_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Wavelengths past the old context are stretched, short ones kept, with a smooth blend between."""
    factor, limit = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_F = limit * plain_F / (2 * math.pi)
    blend_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return plain_F * blend_F + plain_F / factor * (1 - blend_F)


def _yarn_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def ropes_of(config: ModelConfig) -> tuple[Rope, Rope] | None:
    """The rotations of layers without and with a window (often the same object), or None without rotary positions."""
    if config.position != "rotary":
        return None
    main = Rope(
        rotary_dim=config.rotary_dim,
        theta=config.rope_theta,
        max_position_embeddings=config.max_position_embeddings,
        scaling=config.rope_scaling,
        interleaved=config.rotary_interleaved,
    )
    if config.local_rope_theta is None:
        return main, main
    local = Rope(
        rotary_dim=config.rotary_dim,
        theta=config.local_rope_theta,
        max_position_embeddings=config.max_position_embeddings,
        scaling=config.local_rope_scaling,
        interleaved=config.rotary_interleaved,
    )
    return main, local
