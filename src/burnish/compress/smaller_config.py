"""The shape that structured pruning leaves, and whether some config.json can say it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from burnish.errors import BurnishError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.families.registry import family_named

_HEADS_DIVIDE_HIDDEN = ("llama", "gemma2", "gemma3")
"""Families whose classes in transformers refuse a hidden size that the number of heads does not divide."""
_LIKE_LLAMA = "mistral"
"""Computes what Llama without biases does when it has no window, and takes any number of heads."""


def smaller_config(shape: ModelConfig, *, num_kv_heads: int, channels: int, removed: Sequence[int]) -> ModelConfig:
    """The config of a model that keeps so many key-value heads (with their query heads) and channels, less some layers.

    A Llama whose remaining heads do not divide its hidden size becomes a Mistral without a window: the same arithmetic
    in a class that allows it.

    Raises:
        ConfigError: nothing of one kind would be left, or no config.json of the family says such a shape.
    """
    for what, left in (("head", num_kv_heads), ("channel", channels)):
        if left < 1:
            raise ConfigError(f"no {what} would be left", remedy=f"Remove a smaller share of the {what}s.")
    smaller = without_layers(shape, removed)
    if num_kv_heads != shape.num_kv_heads:
        if shape.position == "alibi":
            raise ConfigError(
                "heads of a model with ALiBi cannot be removed: the slopes of the others depend on their number",
                remedy="Remove channels or layers.",
            )
        smaller = replace(
            smaller, num_kv_heads=num_kv_heads, num_heads=shape.num_heads // shape.num_kv_heads * num_kv_heads
        )
    smaller = replace(smaller, intermediate_size=channels)
    if smaller == shape:
        return shape
    if smaller.family in _HEADS_DIVIDE_HIDDEN and smaller.hidden_size % smaller.num_heads:
        group = shape.num_heads // shape.num_kv_heads
        other = replace(smaller, family=_LIKE_LLAMA)
        if smaller.family == "llama" and _can_be_said(other):
            return other
        allowed = [count for count in range(1, shape.num_kv_heads) if shape.hidden_size % (count * group) == 0]
        raise ConfigError(
            f"transformers takes no {smaller.family} of hidden size {shape.hidden_size} with {smaller.num_heads} heads",
            expected=f"{' or '.join(map(str, allowed))} of {shape.num_kv_heads} key-value heads left",
        )
    if not _can_be_said(smaller):
        raise ConfigError(
            f"config.json of {shape.family} cannot say this shape",
            got=f"{smaller.num_heads} heads of {smaller.head_dim}, {channels} channels, {smaller.num_layers} layers, "
            f"hidden size {smaller.hidden_size}",
            remedy="Remove layers instead.",
        )
    return smaller


def without_layers(shape: ModelConfig, removed: Sequence[int]) -> ModelConfig:
    """The config less some layers.

    Raises:
        ConfigError: scores are scaled by the number of their layer.
    """
    if not removed:
        return shape
    if shape.scale_by_layer:
        raise ConfigError(
            "layers cannot be removed where scores are divided by the layer's number",
            remedy="Remove heads or channels.",
        )
    left = [shape.window(layer) for layer in range(shape.num_layers) if layer not in removed]
    alike = len(set(left)) == 1
    return replace(
        shape,
        num_layers=len(left),
        sliding_window=left[0] if alike else None,
        layer_windows=None if alike else tuple(left),
    )


def _can_be_said(config: ModelConfig) -> bool:
    """Whether the family's config.json, read again, is this config."""
    family = family_named(config.family)
    try:
        return family.config_from_hf(family.config_to_hf(config)) == config
    except BurnishError:
        return False
