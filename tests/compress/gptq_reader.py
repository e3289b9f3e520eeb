"""A reader of GPTQ folders written from the layout's definition in plain numpy, sharing no code with burnish.

Bits are read one by one from the little-endian stream, which is slow and hard to get wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def stream_values(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` unsigned values of `bits` bits from a 1-D array of 32-bit words, lowest bit first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
    grouped = stream[: count * bits].reshape(count, bits).astype(np.int64)
    return grouped @ (1 << np.arange(bits))


def dequantize(tensors: dict[str, np.ndarray], module: str, *, bits: int, zero_offset: int = 1) -> np.ndarray:
    """The (out, in) float32 weight of one packed linear."""
    qweight, qzeros = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    scales, g_idx = tensors[f"{module}.scales"].astype(np.float32), tensors[f"{module}.g_idx"]
    num_out, num_in = qweight.shape[1], g_idx.shape[0]
    weight = np.empty((num_out, num_in), dtype=np.float32)
    zeros = np.stack([stream_values(row, bits, num_out) for row in qzeros]) + zero_offset
    for row in range(num_out):
        ints = stream_values(qweight[:, row], bits, num_in)
        weight[row] = (ints - zeros[g_idx, row]) * scales[g_idx, row]
    return weight


def dense_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a GPTQ folder with every packed linear replaced by its dense weight, in float32."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == "gptq"
    tensors = load_file(folder / "model.safetensors")
    packed = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    dense = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in packed}
    for module in packed:
        dense[f"{module}.weight"] = dequantize(tensors, module, bits=config["bits"])
        if f"{module}.bias" in tensors:
            dense[f"{module}.bias"] = tensors[f"{module}.bias"]
    return dense
