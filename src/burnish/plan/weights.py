"""Bytes of a model's weights in every format burnish reads or writes, and of its keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
REST_BYTES = 2
"""Embeddings, norms, biases and the output layer of a quantized model stay in 16 bits."""

GROUP_SIZE = 128
NF4_BLOCK = 64
NF4_SCALES_PER_BLOCK = 256

QUANTIZED = ("int8", "int4", "w8a8", "nf4")
FORMATS = (*DTYPE_BYTES, *QUANTIZED)


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Where the bytes of one format go.

    Attributes:
        packed: integers of the quantized linears.
        scales: what turns them back into weights: scales, zero points, group indices.
        dense: everything that is not quantized.
    """

    packed: int
    scales: int
    dense: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.scales + self.dense


def block_linears(config: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of every linear inside the blocks: what quantization and LoRA reach."""
    return [shape for name, shape in config.linear_shapes().items() if name.startswith("model.layers.")]


def linear_groups(config: ModelConfig) -> list[tuple[tuple[str, ...], int, int]]:
    """The linears of one block that read the same input: their roles, outputs of all together, inputs."""
    shapes = {name.rpartition(".")[2]: shape for name, shape in config.linear_shapes().items() if ".layers.0." in name}
    groups = []
    for roles in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        there = tuple(role for role in roles if role in shapes)
        groups.append((there, sum(shapes[role][0] for role in there), shapes[there[0]][1]))
    return groups


def weight_bytes(
    config: ModelConfig, weight_format: str, *, group_size: int = GROUP_SIZE, rest_bytes: int = REST_BYTES
) -> WeightBytes:
    """Bytes of all weights in one format; quantized formats reach the linears inside the blocks only.

    - float32, float16, bfloat16: parameters x bytes.
    - int8, int4: the GPTQ layout. Per linear: out x in x bits / 8, a float16 scale and a zero point of `bits` bits per
      output and group of `group_size` inputs (-1: one group), and a 4-byte group index per input.
    - w8a8: a byte per weight and a float32 scale per output.
    - nf4: 4 bits per weight, one byte of scale per 64 weights and a float32 scale of scales per 256 of those
      (double quantization; Dettmers et al., 2023, arXiv:2305.14314, section 3).

    Args:
        rest_bytes: per number that is not quantized.

    Raises:
        ConfigError: the format is unknown.
    """
    if weight_format in DTYPE_BYTES:
        return WeightBytes(packed=0, scales=0, dense=config.num_parameters() * DTYPE_BYTES[weight_format])
    if weight_format not in QUANTIZED:
        raise ConfigError("unknown weight format", got=weight_format, expected=", ".join(FORMATS))
    bits = 8 if weight_format in ("int8", "w8a8") else 4
    linears = block_linears(config)
    weights = sum(rows * columns for rows, columns in linears)
    if weight_format == "nf4":
        scales = sum(_nf4_scales(rows * columns) for rows, columns in linears)
    elif weight_format == "w8a8":
        scales = sum(4 * rows for rows, _ in linears)
    else:
        scales = sum(_group_scales(rows, columns, bits=bits, group_size=group_size) for rows, columns in linears)
    return WeightBytes(
        packed=weights * bits // 8, scales=scales, dense=(config.num_parameters() - weights) * rest_bytes
    )


def running_bytes(
    config: ModelConfig, weight_format: str, *, group_size: int = GROUP_SIZE, rest_bytes: int = REST_BYTES
) -> int:
    """Bytes of the weights while burnish's own torch path runs them.

    Group-quantized linears are held ready to run: one byte per weight whatever the bits, a float16 scale and a byte of
    zero point per group, four bytes per input. Other formats run as they are stored.
    """
    if weight_format not in ("int8", "int4"):
        return weight_bytes(config, weight_format, rest_bytes=rest_bytes).total
    linears = block_linears(config)
    weights = sum(rows * columns for rows, columns in linears)
    scales = sum(3 * rows * _groups(columns, group_size) + 4 * columns for rows, columns in linears)
    return weights + scales + (config.num_parameters() - weights) * rest_bytes


def kv_bytes(config: ModelConfig, *, tokens: int, bytes_per_element: int) -> int:
    """Keys and values of one sequence of `tokens` tokens; layers with a window keep no more than the window."""
    per_token_and_layer = 2 * config.num_kv_heads * config.head_dim * bytes_per_element
    kept = sum(min(tokens, config.window(layer) or tokens) for layer in range(config.num_layers))
    return per_token_and_layer * kept


def adapter_parameters(config: ModelConfig, *, rank: int, target_modules: str | tuple[str, ...] = "all-linear") -> int:
    """Numbers of a LoRA adapter: rank x (in + out) per linear it reaches (Hu et al., 2021, arXiv:2106.09685).

    Args:
        target_modules: roles such as "q_proj", or "all-linear" for every linear of the blocks.
    """
    return rank * sum(rows + columns for rows, columns in adapted_linears(config, target_modules))


def adapted_linears(config: ModelConfig, target_modules: str | tuple[str, ...]) -> list[tuple[int, int]]:
    """(out, in) of the linears that carry an adapter.

    Raises:
        ConfigError: a role that the model does not have.
    """
    if target_modules == "all-linear":
        return block_linears(config)
    roles = (target_modules,) if isinstance(target_modules, str) else target_modules
    shapes = config.linear_shapes()
    known = {name.rpartition(".")[2] for name in shapes}
    if unknown := sorted(set(roles) - known):
        raise ConfigError(f"the model has no linear called {', '.join(unknown)}", expected=", ".join(sorted(known)))
    return [shape for name, shape in shapes.items() if name.rpartition(".")[2] in roles]


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else math.ceil(columns / group_size)


def _group_scales(rows: int, columns: int, *, bits: int, group_size: int) -> int:
    groups = _groups(columns, group_size)
    return groups * (2 * rows + math.ceil(rows * bits / 8)) + 4 * columns


def _nf4_scales(weights: int) -> int:
    blocks = math.ceil(weights / NF4_BLOCK)
    return blocks + 4 * math.ceil(blocks / NF4_SCALES_PER_BLOCK)
