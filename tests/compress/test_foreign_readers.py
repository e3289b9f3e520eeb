"""AWQ and bitsandbytes folders, packed here by code of its own from the layouts' definitions, in plain numpy.

With bitsandbytes itself: see docs/formats.md for what was run and when.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.loading import load_model
from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder, save_decoder

CODES = [0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]  # fmt: skip
NF4 = np.array(
    [-1.0, *CODES[1:], 0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0],
    dtype=np.float32,
)
Packed = Callable[[np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]


def small(family: str) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rotary_dim": 16,
        "max_position_embeddings": 64,
    }
    return Decoder(ModelConfig(family=family, **sizes), dtype=torch.float32).initialize(std=0.15, seed=1).eval()


def awq(weight_OI: np.ndarray, group: int = 32) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Asymmetric 4 bits in AutoAWQ's gemm layout, and the weight that it stands for."""
    groups = weight_OI.reshape(len(weight_OI), -1, group)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    zero = np.clip(np.round(-low / scale.astype(np.float32)), 0, 15).astype(np.int64)
    scale32 = scale.astype(np.float32)
    ints = np.clip(np.round(groups / scale32[..., None]) + zero[..., None], 0, 15).astype(np.int64)
    stands_for = ((ints - zero[..., None]) * scale32[..., None]).reshape(weight_OI.shape)

    def words(values_RO: np.ndarray) -> np.ndarray:
        packed = np.zeros((values_RO.shape[0], values_RO.shape[1] // 8), dtype=np.uint32)
        for column in range(packed.shape[1]):
            for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= (values_RO[:, 8 * column + output] << (4 * nibble)).astype(np.uint32)
        return packed.view(np.int32)

    ints_IO = ints.reshape(weight_OI.shape).T
    return {"qweight": words(ints_IO), "qzeros": words(zero.T), "scales": scale.T.copy()}, stands_for


def nf4(weight_OI: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """4-bit NormalFloat in blocks of 64, as bitsandbytes' state_dict has it, without double quantization."""
    blocks = weight_OI.reshape(-1, 64)
    absmax = np.abs(blocks).max(1).astype(np.float32)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - NF4).argmin(-1).astype(np.uint8)
    flat = codes.reshape(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight_OI.shape)}
    return {
        "weight": ((flat[::2] << 4) | flat[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": NF4.copy(),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy(),
    }, (NF4[codes] * absmax[:, None]).reshape(weight_OI.shape)


def int8(weight_OI: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """LLM.int8()'s rows."""
    peak = np.abs(weight_OI).max(1).astype(np.float32)
    ints = np.round(weight_OI / peak[:, None] * 127).astype(np.int8)
    return {"weight": ints, "SCB": peak, "weight_format": np.array(0, dtype=np.uint8)}, ints * (peak / 127)[:, None]


RECORDS: dict[str, tuple[Packed, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def repack(dense: Path, packed: Path, kind: str) -> None:
    """Turn a dense folder into a packed one, and the dense one into what the packed one stands for."""
    pack, record = RECORDS[kind]
    weights, stored, changed = load_file(dense / "model.safetensors"), {}, {}
    for name, tensor in weights.items():
        stored[name] = changed[name] = tensor
        if ".layers." in name and name.endswith("proj.weight"):
            parts, stands_for = pack(tensor.numpy())
            del stored[name]
            stem = name.removesuffix("weight")
            stored |= {f"{stem}{suffix}": torch.from_numpy(value) for suffix, value in parts.items()}
            changed[name] = torch.from_numpy(stands_for.astype(np.float32))
    packed.mkdir()
    save_file({name: value.contiguous() for name, value in stored.items()}, packed / "model.safetensors")
    save_file({name: value.contiguous() for name, value in changed.items()}, dense / "model.safetensors")
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": record}), encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("kind", RECORDS)
def test_a_packed_folder_computes_what_its_integers_stand_for(kind: str, family: str, tmp_path: Path) -> None:
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_decoder(small(family), dense, source=None)
    repack(dense, packed, kind)
    tokens_BT = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(2))
    loaded = load_model(packed, dtype="float32")
    with torch.no_grad():
        expected, found = load_decoder(dense, dtype="float32")(tokens_BT), loaded(tokens_BT)
    assert torch.allclose(found, expected, atol=1e-4)
    packed_linears = [module for module in loaded.modules() if isinstance(module, GroupQuantizedLinear)]
    assert len(packed_linears) == (14 if kind == "awq" else 0)


def test_a_fault_in_awq_would_show(tmp_path: Path) -> None:
    """The order of a word's outputs matters: the test above is not blind to it."""
    save_decoder(small("llama"), tmp_path / "dense", source=None)
    repack(tmp_path / "dense", tmp_path / "packed", "awq")
    path = tmp_path / "packed" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.qweight"
    weights[name] = weights[name] << 4 | (weights[name] >> 28) & 15
    save_file(weights, path)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        difference = load_model(tmp_path / "packed", dtype="float32")(tokens_BT) - load_decoder(
            tmp_path / "dense", dtype="float32"
        )(tokens_BT)
    assert float(difference.abs().max()) > 0.01


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("awq", {"version": "gemv"}, "AWQ layout that cannot be read; got version 'gemv'"),
        ("awq", {"bits": 3}, "bits 3"),
        ("nf4", {"quant_method": "hqq"}, "'hqq'"),
    ],
)
def test_other_layouts_are_refused(kind: str, change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    save_decoder(small("llama"), tmp_path / "dense", source=None)
    repack(tmp_path / "dense", tmp_path / "packed", kind)
    path = tmp_path / "packed" / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["quantization_config"] |= change
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=problem):
        load_model(tmp_path / "packed")


@pytest.mark.parametrize("suffix", ["quant_state.bitsandbytes__nf4", "quant_map", "absmax"])
def test_a_damaged_bitsandbytes_folder_is_one_line(suffix: str, tmp_path: Path) -> None:
    save_decoder(small("llama"), tmp_path / "dense", source=None)
    repack(tmp_path / "dense", tmp_path / "packed", "nf4")
    path = tmp_path / "packed" / "model.safetensors"
    weights = load_file(path)
    name = f"model.layers.1.mlp.up_proj.weight.{suffix}"
    weights[name] = weights[name][:-3].clone()
    save_file(weights, path)
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "packed")
