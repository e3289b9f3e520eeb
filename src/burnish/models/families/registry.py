"""Every family burnish knows, and the lookup by config.json. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.errors import CheckpointError
from burnish.models.families import bloom, codegen, falcon, gemma, gpt2, gpt_neox, llama, mistral, phi3, qwen2, qwen3
from burnish.models.families.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    bloom.FAMILY,
    falcon.FAMILY,
    codegen.FAMILY,
    phi3.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
)

_BY_NAME = {family.name: family for family in FAMILIES}
_BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}
_BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def family_named(name: str) -> Family:
    """The family that `ModelConfig.family` names.

    Raises:
        CheckpointError: there is none.
    """
    if name not in _BY_NAME:
        raise CheckpointError("unknown family", got=name, expected=f"one of {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]


def family_for(hf_config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json, by its "architectures", or by "model_type" when it has none.

    Raises:
        CheckpointError: no family has it; the message lists the architectures that are known.
    """
    architectures = hf_config.get("architectures") or []
    for name in architectures:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    model_type = hf_config.get("model_type")
    if not architectures and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    raise CheckpointError(
        "config.json names an architecture that burnish does not know",
        got=", ".join(map(str, architectures)) or f"model_type {model_type!r}",
        expected=f"one of {', '.join(sorted(_BY_ARCHITECTURE))}",
        remedy="Use --engine transformers to run it through transformers.",
    )
