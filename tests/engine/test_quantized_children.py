"""Children of every width run on the compiled kernels as they are stored, whatever the family or the columns' order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from burnish.compress.config import QuantizeConfig
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.quantize import quantize_model
from burnish.engine import cpu_program
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.kernels.cpu.library import load
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 96
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 5},
    "falcon": {"norm": "layernorm", "mlp": "plain", "activation": "gelu", "parallel_residual": True},
}


def _decoder(family: str) -> Decoder:
    config = ModelConfig(
        **{
            "family": family.partition("-")[0],
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_layers": 2,
            "num_heads": 6,
            "num_kv_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rotary_dim": 8,
            **FAMILIES[family],
        }  # type: ignore[arg-type]
    )
    return Decoder(config).initialize(std=0.15, seed=3).eval()


def _examples() -> list[list[int]]:
    return torch.randint(0, VOCAB, (6, 40), generator=torch.Generator().manual_seed(5)).tolist()


def _widened(name: str, layer: nn.Module) -> nn.Module:
    """The same integers and zero points, stored in 4 bits."""
    assert isinstance(layer, GroupQuantizedLinear)
    return GroupQuantizedLinear.from_quantized(replace(layer.quantized(), bits=4), bias=layer.bias)


def _tokens(decoder: Decoder, backend: str) -> list[tuple[int, ...]]:
    engine = NativeEngine(decoder, dtype="float32", backend=backend, speculation="off")
    assert engine.stats().backend == backend
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [example[:9] for example in _examples()[:3]]
    return [tuple(output.token_ids) for output in engine.generate(prompts, params) if output.finish_reason]


@pytest.mark.skipif(load() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_children_run_on_the_kernels_as_they_are_stored(family: str, bits: int, ordered: bool) -> None:
    config = QuantizeConfig(bits=bits, group_size=16, activation_order=ordered)
    child = _decoder(family)
    quantize_model(child, _examples(), config)
    assert cpu_program.against(child) is None
    if bits >= 4:
        assert _tokens(child, "cpu")
        return
    wide = _decoder(family)
    quantize_model(wide, _examples(), config)
    for block in wide.model.layers:
        for name, module in [*block.named_modules()]:
            if isinstance(module, GroupQuantizedLinear):
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, _widened(name, module))
    assert _tokens(child, "cpu") == _tokens(wide, "cpu")
