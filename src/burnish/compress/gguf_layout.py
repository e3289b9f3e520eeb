"""What a GGUF file says of each family: names, order of rows and settings, as llama.cpp reads them. Torch-free.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file names one of llama.cpp's architectures, whose
code fixes everything that has no key (activations, where norms stand, how heads rotate). A model that differs from its
architecture in such a thing has no place in the format and is refused here, before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig

Setting = int | float | bool | str | list[bool]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        sources: canonical names whose rows are laid one below the other.
        rotary_heads: per source, how many heads' rows are interleaved (first, second half's first, ...); 0 for none.
        offset: added to every value.
        kind: "matrix" may be quantized, "output" too but never below 8 bits, "vector" stays float32.
        values: a constant instead of sources.
    """

    name: str
    sources: tuple[str, ...] = ()
    rotary_heads: tuple[int, ...] = ()
    offset: float = 0.0
    kind: str = "matrix"
    values: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """A model as a GGUF file holds it; `notes` say what the file cannot."""

    architecture: str
    settings: dict[str, Setting]
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """One of llama.cpp's architectures: what its code takes for granted.

    Attributes:
        activations: what it computes; a GELU is always the tanh form there.
        fused: q, k and v in one tensor.
        gate_in_up: gate and up in one tensor.
        interleaved: heads rotate in neighbouring pairs.
        biases: which groups of biases it looks for.
        windows: 0 where attention sees everything, else every how many layers one has no window.
        needs_output: wants an output layer of its own, also where the embedding serves as one.
        check: further conditions; returns what is wrong.
    """

    name: str
    activations: tuple[str, ...]
    fused: bool = False
    gate_in_up: bool = False
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    windows: int = 0
    needs_output: bool = False
    check: Callable[[ModelConfig], str | None] = field(default=lambda config: None)


def _wide_heads(config: ModelConfig) -> str | None:
    return None if config.num_heads * config.head_dim == config.hidden_size else "heads that do not fill the width"


def _llama(config: ModelConfig) -> str | None:
    return None if config.rotary_dim == config.head_dim else "heads that rotate in part"


def _gpt2(config: ModelConfig) -> str | None:
    plain = config.attention_scale is None and not config.scale_by_layer
    return _wide_heads(config) if plain else "its own scaling of attention"


def _bloom(config: ModelConfig) -> str | None:
    return "residuals taken after the norm" if config.residual_from_norm else _wide_heads(config)


def _falcon(config: ModelConfig) -> str | None:
    if config.position == "alibi" or not config.parallel_residual:
        return "ALiBi or sequential blocks"
    return _wide_heads(config)


def _gemma(config: ModelConfig) -> str | None:
    whole = config.hidden_size / config.num_heads if config.num_layers in (46, 62) else config.head_dim
    scale = config.attention_scale or config.head_dim**-0.5
    if not math.isclose(scale, whole**-0.5, rel_tol=1e-6):
        return "its own scaling of attention"
    if config.local_rope_scaling is not None:
        return "a scaled rotation in its windowed layers"
    return None


_ALL = ("qkv", "o", "mlp")
ARCHITECTURES = {
    "llama": _Architecture(name="llama", activations=("silu",), interleaved=True, biases=_ALL, check=_llama),
    "mistral": _Architecture(name="llama", activations=("silu",), interleaved=True, check=_llama),
    "qwen2": _Architecture(name="qwen2", activations=("silu",), biases=("qkv",)),
    "qwen3": _Architecture(name="qwen3", activations=("silu",)),
    "gpt2": _Architecture(name="gpt2", activations=("gelu_tanh",), fused=True, biases=_ALL, check=_gpt2),
    "gpt_neox": _Architecture(
        name="gptneox", activations=("gelu", "gelu_tanh"), fused=True, biases=_ALL, needs_output=True, check=_wide_heads
    ),
    "bloom": _Architecture(name="bloom", activations=("gelu_tanh",), fused=True, biases=_ALL, check=_bloom),
    "falcon": _Architecture(name="falcon", activations=("gelu", "gelu_tanh"), fused=True, check=_falcon),
    "phi3": _Architecture(name="phi3", activations=("silu",), fused=True, gate_in_up=True, check=_wide_heads),
    "gemma2": _Architecture(name="gemma2", activations=("gelu_tanh",), windows=2, check=_gemma),
    "gemma3": _Architecture(name="gemma3", activations=("gelu_tanh",), windows=6, check=_gemma),
}
"""By burnish's family; CodeGen has none."""
_NEEDED_BIASES = {"gpt2": _ALL, "bloom": _ALL, "gptneox": _ALL}


def gguf_layout(config: ModelConfig) -> GgufLayout:
    """How llama.cpp wants this model.

    Raises:
        ConfigError: llama.cpp has no such family, or its code computes something else than this model does.
    """
    architecture = ARCHITECTURES.get(config.family)
    if architecture is None:
        raise ConfigError(
            "llama.cpp does not know this family", got=config.family, expected=f"one of {', '.join(ARCHITECTURES)}"
        )
    _check(config, architecture)
    notes: list[str] = []
    settings = _settings(config, architecture, notes)
    tensors = (*_tensors(config, architecture), *_rope_tensors(config))
    if (config.rope_scaling or {}).get("rope_type") == "longrope":
        notes.append("llama.cpp picks LongRoPE's long or short factors by the context it is started with")
    if config.activation == "gelu":
        notes.append("llama.cpp computes GELU by its tanh form: logits differ in about the third digit")
    return GgufLayout(architecture=architecture.name, settings=settings, tensors=tensors, notes=tuple(notes))


def _check(config: ModelConfig, architecture: _Architecture) -> None:
    has = {"qkv": config.qkv_bias, "o": config.o_bias, "mlp": config.mlp_bias}
    wrong = architecture.check(config)
    if config.activation not in architecture.activations:
        wrong = f"the activation {config.activation}"
    for name in (name for name, there in has.items() if there and name not in architecture.biases):
        wrong = f"biases on {name}"
    for name in _NEEDED_BIASES.get(architecture.name, ()):
        if not has[name]:
            wrong = f"no biases on {name}"
    if config.lm_head_bias:
        wrong = "a bias on the output layer"
    if architecture.name == "gemma2" and not config.tie_word_embeddings:
        wrong = "an output layer of its own"
    scaling = config.rope_scaling or {}
    known = ("longrope",) if architecture.name == "phi3" else ("linear", "yarn", "llama3")
    if scaling and scaling["rope_type"] not in known:
        wrong = f"{scaling['rope_type']} scaling of its positions"
    if scaling.get("rope_type") == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        if any(scaling.get(key, value) not in (None, value) for key, value in usual.items()) or any(
            scaling.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")
        ):
            wrong = "YaRN with constants of its own"
    if architecture.windows and len({config.window(layer) for layer in range(config.num_layers)} - {None}) > 1:
        wrong = "windows of several lengths"
    if wrong:
        raise ConfigError(
            f"this model cannot be a GGUF file: llama.cpp's {architecture.name} does not compute it",
            got=wrong,
            remedy="Use --to safetensors or --to ctranslate2.",
        )


def _settings(config: ModelConfig, architecture: _Architecture, notes: list[str]) -> dict[str, Setting]:
    name = architecture.name
    context = config.max_position_embeddings
    windows = {config.window(layer) for layer in range(config.num_layers)} - {None}
    if windows and not architecture.windows:
        shortest = min(window for window in windows if window is not None)
        if shortest < context:
            context = shortest
            notes.append(f"llama.cpp has no attention windows for {name}: the context is given as {context} tokens")
    settings: dict[str, Setting] = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
    }
    norm = "layer_norm_epsilon" if config.norm == "layernorm" else "layer_norm_rms_epsilon"
    settings[f"attention.{norm}"] = float(config.norm_eps)
    if config.num_heads * config.head_dim != config.hidden_size or architecture.windows:
        settings |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.position == "rotary":
        settings |= {"rope.dimension_count": config.rotary_dim, "rope.freq_base": float(config.rope_theta)}
        settings |= _rope_settings(config)
    if name == "gptneox":
        settings["use_parallel_residual"] = config.parallel_residual
    if name == "falcon":
        settings["tensor_data_layout"] = "jploski"
    if architecture.windows and windows:
        settings["attention.sliding_window"] = min(window for window in windows if window is not None)
        pattern = [config.window(layer) is not None for layer in range(config.num_layers)]
        if pattern != _usual_windows(config, architecture):
            settings["attention.sliding_window_pattern"] = pattern
    if config.local_rope_theta is not None:
        settings["rope.freq_base_swa"] = float(config.local_rope_theta)
    if config.attention_softcap is not None:
        settings["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap is not None:
        settings["final_logit_softcapping"] = float(config.logit_softcap)
    return settings


def _usual_windows(config: ModelConfig, architecture: _Architecture) -> list[bool]:
    return [(layer + 1) % architecture.windows != 0 for layer in range(config.num_layers)]


def _rope_settings(config: ModelConfig) -> dict[str, Setting]:
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] == "llama3":
        return {}
    original = int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    if scaling["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    stretch = float(scaling.get("factor") or config.max_position_embeddings / original)
    if scaling["rope_type"] == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": stretch,
            "rope.scaling.original_context_length": original,
        }
    factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(scaling.get("attention_factor") or factor),
    }


def _rope_tensors(config: ModelConfig) -> list[GgufTensor]:
    """Llama 3's and LongRoPE's divisors of the rotation's frequencies."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "longrope":
        return [
            GgufTensor(
                name=f"rope_factors_{which}.weight",
                values=tuple(float(factor) for factor in scaling[f"{which}_factor"]),
                kind="vector",
            )
            for which in ("long", "short")
        ]
    if scaling.get("rope_type") != "llama3":
        return []
    low, high, original = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for dim in range(0, config.rotary_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (dim / config.rotary_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return [GgufTensor(name="rope_freqs.weight", values=tuple(factors), kind="vector")]


def _tensors(config: ModelConfig, architecture: _Architecture) -> list[GgufTensor]:
    names = list(config.parameter_shapes())
    taken: set[str] = set()
    tensors: list[GgufTensor] = []
    for name in names:
        if name in taken:
            continue
        tensor = _tensor(name, names, config, architecture)
        taken.update(tensor.sources)
        tensors.append(tensor)
    if architecture.needs_output and config.tie_word_embeddings:
        tensors.append(GgufTensor(name="output.weight", sources=("model.embed_tokens.weight",), kind="output"))
    return tensors


_TOP = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.embed_norm": "token_embd_norm",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_output_norm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _tensor(name: str, names: list[str], config: ModelConfig, architecture: _Architecture) -> GgufTensor:
    module, _, suffix = name.rpartition(".")
    if module in _TOP:
        kind = "matrix"
        if module == "lm_head" or (module == "model.embed_tokens" and config.tie_word_embeddings):
            kind = "output"
        elif module != "model.embed_tokens":
            kind = "vector"  # positions and norms are only read as float32
        offset = config.norm_weight_offset if module == "model.norm" and suffix == "weight" else 0.0
        return GgufTensor(name=f"{_TOP[module]}.{suffix}", sources=(name,), kind=kind, offset=offset)
    _, _, layer, inside = module.split(".", 3)
    prefix = f"model.layers.{layer}"
    role = inside.rpartition(".")[2]
    sources: tuple[str, ...] = (name,)
    short = _IN_BLOCK[inside]
    heads: tuple[int, ...] = ()
    if role in ("q_proj", "k_proj", "v_proj"):
        rotating = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        if architecture.fused:
            short = "attn_qkv"
            sources = tuple(f"{prefix}.self_attn.{part}_proj.{suffix}" for part in "qkv")
        elif architecture.interleaved and not config.rotary_interleaved:
            heads = (rotating.get(role, 0),)
    if architecture.gate_in_up and role in ("gate_proj", "up_proj"):
        short = "ffn_up"
        sources = tuple(f"{prefix}.mlp.{part}_proj.{suffix}" for part in ("gate", "up"))
    if architecture.name == "falcon" and not config.shared_norm:
        # The larger Falcons: attention's norm is the second there, the MLP's the first.
        short = {"attn_norm": "attn_norm_2", "ffn_norm": "attn_norm"}.get(short, short)
    assert all(source in names for source in sources)
    is_norm = role.endswith("norm")
    return GgufTensor(
        name=f"blk.{layer}.{short}.{suffix}",
        sources=sources,
        rotary_heads=heads if any(heads) else (),
        offset=config.norm_weight_offset if is_norm and suffix == "weight" else 0.0,
        kind="matrix" if suffix == "weight" and not is_norm else "vector",
    )
