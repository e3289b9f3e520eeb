"""What a decoder is, as data: every difference between families is a field here, never a test on a name.

Torch-free, so that `plan` and the command line can read a model's shape without loading torch.
The tensors that a config implies are listed by `ModelConfig.parameter_shapes`; the module that computes them is
`decoder.Decoder`; how a family's config.json becomes a `ModelConfig` is in `families/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from burnish.errors import ConfigError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu")
ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    Attributes:
        family: name of the family whose record reads and writes this model's files; nothing else depends on it.
        norm_weight_offset: added to a norm's weight before it multiplies; where it is not 0 the product is taken in
            float32 before rounding to the activations' dtype.
        rope_scaling: the scaling rule with its own `rope_type` (one of `ROPE_TYPES`) and numbers, or None.
        local_rope_theta: base of the rotation in layers that have a window, where it differs from `rope_theta`;
            such layers take no `rope_scaling` but `local_rope_scaling`.
        rotary_dim: how many of a head's dimensions rotate; 0 without rotary positions.
        rotary_interleaved: pairs are (0, 1), (2, 3), ... instead of (0, R/2), (1, R/2 + 1), ...
        alibi_scale: multiplies the ALiBi bias before it is added to the scaled scores.
        alibi_bfloat16: slopes and slope times position are rounded to bfloat16, as the model was trained.
        parallel_residual: attention and MLP both read the block's input, and both are added to it.
        shared_norm: with `parallel_residual`, the MLP reads the attention's norm; there is no second one.
        residual_from_norm: the residual is the norm's output instead of its input.
        output_norms: attention's and MLP's outputs are normed before they join the residual.
        qk_norm: queries and keys are normed per head before they rotate.
        attention_scale: multiplies the scores; None means head_dim ** -0.5.
        scale_by_layer: scores of layer i are divided by i + 1 as well.
        attention_softcap, logit_softcap: c * tanh(x / c) on the scores and on the logits.
        embedding_scale: multiplies the token embeddings.
        sliding_window: a query sees itself and the `sliding_window - 1` tokens before it, in every layer.
        layer_windows: the window of each layer (None: everything before); replaces `sliding_window`.
        fused_qkv_blocks: how many interleaved blocks the files' fused query/key/value rows come in, in families
            whose files vary in it; no effect on the computation.
        eos_ids: every id that ends a text according to config.json.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_weight_offset: float = 0.0
    position: Literal["rotary", "alibi", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    local_rope_theta: float | None = None
    local_rope_scaling: Mapping[str, Any] | None = None
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    alibi_scale: float = 1.0
    alibi_bfloat16: bool = False
    mlp: Literal["gated", "plain"] = "gated"
    activation: str = "silu"
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_from_norm: bool = False
    output_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_windows: tuple[int | None, ...] | None = None
    fused_qkv_blocks: int = 1
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} is out of range", got=repr(size), expected="a whole number, 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_heads must be a multiple of num_kv_heads", got=f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError("unknown activation", got=self.activation, expected=f"one of {', '.join(ACTIVATIONS)}")
        if self.tie_word_embeddings and self.lm_head_bias:
            raise ConfigError("a tied output layer with a bias is not supported", remedy="Try --engine transformers.")
        if self.position == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ConfigError("rotary_dim is out of range", got=self.rotary_dim, expected=f"even, 2..{self.head_dim}")
        for scaling in (self.rope_scaling, self.local_rope_scaling):
            if scaling is not None and scaling.get("rope_type") not in ROPE_TYPES:
                raise ConfigError(
                    "unknown rope_type in rope_scaling",
                    got=scaling.get("rope_type"),
                    expected=f"one of {', '.join(ROPE_TYPES)}",
                    remedy="Try --engine transformers.",
                )
        if self.layer_windows is not None and len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                "layer_windows must have one entry per layer", got=len(self.layer_windows), expected=self.num_layers
            )

    def window(self, layer: int) -> int | None:
        """How many tokens a query of `layer` sees, itself included; None without a limit."""
        return self.sliding_window if self.layer_windows is None else self.layer_windows[layer]

    def scale(self, layer: int) -> float:
        """What the scores of `layer` are multiplied by."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_layer else scale

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back to an equal config."""
        record = asdict(self)
        record["eos_ids"] = list(self.eos_ids)
        if self.layer_windows is not None:
            record["layer_windows"] = list(self.layer_windows)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise ConfigError(f"unknown model config keys: {', '.join(unknown)}")
        values = dict(record)
        values["eos_ids"] = tuple(values.get("eos_ids", ()))
        if values.get("layer_windows") is not None:
            values["layer_windows"] = tuple(values["layer_windows"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"incomplete model config: {error}") from error

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear, by canonical module name; a tied output layer is none."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, int]] = {}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.self_attn.q_proj"] = (query, hidden)
            shapes[f"{prefix}.self_attn.k_proj"] = (key, hidden)
            shapes[f"{prefix}.self_attn.v_proj"] = (key, hidden)
            shapes[f"{prefix}.self_attn.o_proj"] = (hidden, query)
            if self.mlp == "gated":
                shapes[f"{prefix}.mlp.gate_proj"] = (inner, hidden)
            shapes[f"{prefix}.mlp.up_proj"] = (inner, hidden)
            shapes[f"{prefix}.mlp.down_proj"] = (hidden, inner)
        if not self.tie_word_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    def has_bias(self, linear: str) -> bool:
        """Whether the linear of this canonical module name carries a bias."""
        role = linear.rpartition(".")[2]
        if role in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return {"o_proj": self.o_bias, "lm_head": self.lm_head_bias}.get(role, self.mlp_bias)

    def norm_shapes(self) -> dict[str, tuple[int]]:
        """Width of every norm, by canonical module name."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int]] = {}
        if self.embedding_norm:
            shapes["model.embed_norm"] = hidden
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm"] = hidden
            if not self.shared_norm:
                shapes[f"{prefix}.post_attention_layernorm"] = hidden
            if self.output_norms:
                shapes[f"{prefix}.attention_output_norm"] = hidden
                shapes[f"{prefix}.mlp_output_norm"] = hidden
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm"] = (self.head_dim,)
        shapes["model.norm"] = hidden
        return shapes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by canonical name: exactly the keys of the decoder's state_dict."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        if self.position == "learned":
            shapes["model.embed_positions.weight"] = (self.max_position_embeddings, self.hidden_size)
        for name, shape in self.linear_shapes().items():
            shapes[f"{name}.weight"] = shape
            if self.has_bias(name):
                shapes[f"{name}.bias"] = (shape[0],)
        for name, width in self.norm_shapes().items():
            shapes[f"{name}.weight"] = width
            if self.norm == "layernorm":
                shapes[f"{name}.bias"] = width
        return shapes

    def num_parameters(self) -> int:
        """How many numbers the model stores; tied weights count once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values that one token keeps over all layers (windows not taken into account)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element
