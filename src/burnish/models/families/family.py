"""The record of a family, and the small readers of config.json that several families share. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.weight_map import Rule, WeightMap

HFConfig = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one family of models.

    Attributes:
        name: what `ModelConfig.family` says.
        architectures: class names in config.json's "architectures".
        model_types: config.json's "model_type", looked at when "architectures" is missing.
        config_from_hf: reads a parsed config.json; raises CheckpointError when a key is missing or not supported.
        config_to_hf: writes one that `config_from_hf` and transformers read.
        weight_map: the rules for one config.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config_from_hf: Callable[[HFConfig], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    weight_map: Callable[[ModelConfig], WeightMap]


def need(hf: HFConfig, *keys: str) -> Any:
    """The value of the first of these keys that is there and not null.

    Raises:
        CheckpointError: none is.
    """
    for key in keys:
        if hf.get(key) is not None:
            return hf[key]
    raise CheckpointError(f"config.json has no {' or '.join(keys)}", remedy="Is it the config of a language model?")


def get(hf: HFConfig, key: str, default: Any) -> Any:
    """The value of a key, or the default when it is missing or null."""
    value = hf.get(key)
    return default if value is None else value


def activation_from_hf(name: str) -> str:
    """Our name of a transformers activation.

    Raises:
        CheckpointError: there is none.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            "config.json asks for an unknown activation", got=name, expected=", ".join(_ACTIVATIONS),
            remedy="Try --engine transformers.",
        )  # fmt: skip
    return _ACTIVATIONS[name]


def activation_to_hf(name: str) -> str:
    """The transformers name of our activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def token_ids(hf: HFConfig, *, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """`bos_id` and `eos_ids` of config.json, with the family's defaults where it says nothing."""
    bos_id = hf.get("bos_token_id", bos)
    eos_id = hf.get("eos_token_id", eos)
    if isinstance(bos_id, list):
        bos_id = bos_id[0] if bos_id else None
    eos_ids = () if eos_id is None else tuple(eos_id) if isinstance(eos_id, list) else (eos_id,)
    return {"bos_id": bos_id, "eos_ids": eos_ids}


def token_ids_to_hf(config: ModelConfig) -> dict[str, Any]:
    """What `token_ids` reads."""
    eos = list(config.eos_ids)
    return {"bos_token_id": config.bos_id, "eos_token_id": (eos or None) if len(eos) != 1 else eos[0]}


def rope_parameters(hf: HFConfig, layer_type: str | None = None) -> HFConfig:
    """The rotary settings wherever config.json keeps them, as one flat mapping.

    transformers 5 writes "rope_parameters" (by layer type in some families); 4 wrote "rope_theta" and "rope_scaling",
    whose kind was "type" before it was "rope_type".
    """
    record = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if layer_type is not None and isinstance(record.get(layer_type), Mapping):
        record = dict(record[layer_type])
    for key in ("rope_theta", "partial_rotary_factor"):
        if record.get(key) is None and hf.get(key) is not None:
            record[key] = hf[key]
    older_kind = record.pop("type", None)
    record["rope_type"] = record.get("rope_type") or older_kind or "default"
    return record


def rope_scaling(hf: HFConfig, parameters: HFConfig) -> dict[str, Any] | None:
    """The scaling rule of `rope_parameters`, with the length it was trained at filled in; None without one."""
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    scaling = {
        key: value
        for key, value in parameters.items()
        if key not in ("rope_theta", "partial_rotary_factor") and value is not None
    }
    scaling["rope_type"] = {"su": "longrope"}.get(kind, kind)
    if scaling["rope_type"] in ("yarn", "longrope", "llama3"):
        if hf.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", need(hf, "max_position_embeddings"))
    missing = [key for key in _SCALING_KEYS.get(str(scaling["rope_type"]), ()) if key not in scaling]
    if missing:
        raise CheckpointError(f"config.json's rope_scaling of type {kind} lacks {', '.join(missing)}")
    return scaling


_SCALING_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def rotary_from_hf(hf: HFConfig, *, head_dim: int, theta: float = 10000.0, fraction: float = 1.0) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_dim` of a config.json with one rotation for all layers."""
    parameters = rope_parameters(hf)
    return {
        "position": "rotary",
        "rope_theta": float(get(parameters, "rope_theta", theta)),
        "rope_scaling": rope_scaling(hf, parameters),
        "rotary_dim": int(head_dim * get(parameters, "partial_rotary_factor", fraction)),
    }


def layer_windows(hf: HFConfig, num_layers: int, *, default: tuple[int | None, ...]) -> dict[str, Any]:
    """`sliding_window` or `layer_windows` from "layer_types" and "sliding_window".

    Args:
        default: each layer's window where config.json has no "layer_types".
    """
    kinds = hf.get("layer_types")
    if kinds is None:
        windows = default
    else:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise CheckpointError(
                "config.json has layer_types that are not supported", got=", ".join(sorted(unknown)),
                remedy="Try --engine transformers.",
            )  # fmt: skip
        windows = tuple(hf.get("sliding_window") if kind == "sliding_attention" else None for kind in kinds)
        windows = windows[:num_layers]
    if len(set(windows)) == 1:
        return {"sliding_window": windows[0]}
    return {"layer_windows": windows}


def layer_types(config: ModelConfig) -> list[str]:
    """What transformers calls each layer's window."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[config.window(layer) is not None] for layer in range(config.num_layers)]


def largest_window(config: ModelConfig) -> int | None:
    """The one window length that config.json can say."""
    windows = {config.window(layer) for layer in range(config.num_layers)} - {None}
    return max(window for window in windows if window is not None) if windows else None


def llama_rules(config: ModelConfig) -> list[Rule]:
    """Rules of files that already use the canonical names: all of them, one to one."""
    modules = ["model.embed_tokens", *config.norm_shapes(), *config.linear_shapes(), "lm_head"]
    names = dict.fromkeys(name.replace("model.layers.0.", "model.layers.{i}.") for name in modules)
    return [
        Rule(source=name, targets=(name,)) for name in names if not name.startswith("model.layers.") or "{i}" in name
    ]
