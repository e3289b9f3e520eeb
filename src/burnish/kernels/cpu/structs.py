"""The C structs of `csrc/types.h`, field by field in the same order. Torch-free."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum


class Format(IntEnum):
    """How a linear's weight is stored."""

    NONE = 0
    F32 = 1
    BF16 = 2
    INT8 = 3
    INT4 = 4
    INT8_GROUPED = 5


class Finish(IntEnum):
    """What happens to a product's rows."""

    STORE = 0
    ADD = 1
    ACTIVATE = 2
    GATE = 3
    ARG_MAX = 4


ACTIVATIONS = {"identity": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "quick_gelu": 5}
ADAPTER_PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _ints(names: str) -> list[tuple[str, type]]:
    return [(name, c_int32) for name in names.split()]


def _floats(names: str) -> list[tuple[str, type]]:
    return [(name, c_float) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


class Linear(Structure):
    _fields_ = [
        *_ints("format n k num_panels k_padded group num_groups reserved"),
        *_pointers("weight scale group_scale group_zero requant_scale bias order"),
    ]


class Norm(Structure):
    _fields_ = [*_ints("kind width"), ("eps", c_float), *_ints("reserved"), *_pointers("weight bias")]


class Adapter(Structure):
    _fields_ = [*_ints("rank inputs outputs reserved"), *_pointers("a b")]


class Layer(Structure):
    _fields_ = [
        *[(name, Norm) for name in "input_norm post_attention_norm attention_output_norm mlp_output_norm".split()],
        ("q_norm", Norm),
        ("k_norm", Norm),
        *[(name, Linear) for name in "qkv o up down".split()],
        ("scale", c_float),
        *_ints("window local_rope reserved"),
        *_pointers("keys values key_scale value_scale"),
    ]


class DecoderStruct(Structure):
    _fields_ = [
        *_ints("hidden inner num_heads num_kv_heads head_dim vocab num_layers gated activation"),
        *_ints("parallel_residual shared_norm residual_from_norm rotary_dim rotary_interleaved"),
        *_ints("kv_format embedding_format max_positions num_adapters"),
        *_floats("embedding_scale attention_softcap logit_softcap alibi_scale"),
        *_pointers("embedding embedding_row_scale position_embedding"),
        *_pointers("rope_cos rope_sin local_rope_cos local_rope_sin alibi_slopes"),
        ("alibi_bfloat16", c_int64),
        ("embedding_norm", Norm),
        ("final_norm", Norm),
        ("head", Linear),
        ("layers", POINTER(Layer)),
        ("adapters", POINTER(Adapter)),
    ]


class StepStruct(Structure):
    _fields_ = [
        *_ints("num_tokens num_sequences num_logits table_width greedy reserved"),
        *_pointers("tokens positions row_starts context_lens block_tables logit_rows adapters"),
        *_pointers("rope_cos rope_sin local_rope_cos local_rope_sin ids logits"),
    ]


STRUCTS = (Linear, Norm, Adapter, Layer, DecoderStruct, StepStruct)
"""In the order in which the library tells their sizes."""
