"""The C structs of `csrc/training.h` and `csrc/quantize.h`, field by field in the same order. Torch-free."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


def _fields(kinds: str) -> list[tuple[str, type]]:
    """From "kind: names", one kind a line."""
    types = {"int": c_int32, "wide": c_int64, "float": c_float, "pointer": c_void_p}
    lines = [line.split(":") for line in kinds.strip().splitlines()]
    return [(name, types[kind.strip()]) for kind, names in lines for name in names.split()]


class NormPass(Structure):
    _fields_ = _fields("""
        int: format weight_format kind rows width again
        float: eps offset
        pointer: x
        wide: x_stride
        pointer: weight bias y
        wide: y_stride
        pointer: stats residual
        wide: residual_stride
        pointer: grad_x
        wide: grad_x_stride
        pointer: grad_weight grad_bias
    """)


class GatePass(Structure):
    _fields_ = _fields("""
        int: format activation rows width
        pointer: gate up grad product grad_gate grad_up
        wide: gate_stride up_stride grad_stride product_stride grad_gate_stride grad_up_stride
    """)


class RotatePass(Structure):
    _fields_ = _fields("""
        int: format interleaved inverse rows heads head_dim pairs reserved
        pointer: x
        wide: stride
        pointer: cos sin
    """)


class LossPass(Structure):
    _fields_ = _fields("""
        int: format with_grad rows width
        float: softcap grad_scale
        pointer: logits labels losses
    """)


class AttentionPass(Structure):
    _fields_ = _fields("""
        int: format num_sequences num_heads num_kv_heads head_dim window
        float: scale
        int: reserved
        pointer: starts slopes q k v out lse grad_out grad_q grad_k grad_v
        wide: q_stride k_stride v_stride out_stride grad_out_stride grad_q_stride grad_k_stride grad_v_stride
    """)


class DequantizePass(Structure):
    _fields_ = _fields("""
        int: format rows width block_size
        pointer: codes levels absmax absmax_levels absmax_scale absmax_offset out
        wide: out_stride
    """)


class GramPass(Structure):
    _fields_ = _fields("""
        int: rows width
        pointer: x
        wide: x_stride
        pointer: total
    """)


class GptqPass(Structure):
    _fields_ = _fields("""
        int: rows width group max_int symmetric num_shrinks
        pointer: weight
        wide: weight_stride
        pointer: factor shrinks importance ints scales zeros
    """)


PASSES = (NormPass, GatePass, RotatePass, LossPass, AttentionPass, DequantizePass, GramPass, GptqPass)
"""In the order in which the library tells their sizes."""

PASS_FUNCTIONS = {
    "norm_forward": NormPass,
    "norm_backward": NormPass,
    "gate_forward": GatePass,
    "gate_backward": GatePass,
    "rotate": RotatePass,
    "loss": LossPass,
    "dequantize": DequantizePass,
    "attention_forward": AttentionPass,
    "attention_backward": AttentionPass,
    "gram": GramPass,
    "gptq": GptqPass,
}
"""What each pass of the library takes."""
