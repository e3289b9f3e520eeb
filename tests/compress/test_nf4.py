"""NF4 and FP4: bitsandbytes' codes and values, odd sizes, exact gradients, loading that never holds the dense model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from burnish.compress.frozen_linear import FrozenLinear, frozen_linears
from burnish.compress.frozen_loading import (
    FrozenFormat,
    dequantize_in_place,
    format_of,
    freeze_in_place,
    load_frozen,
)
from burnish.compress.int8_frozen import Int8Frozen
from burnish.compress.nf4 import BlockFormat, dequantize_blocks, dynamic_levels, quantize_blocks
from burnish.compress.nf4_linear import Nf4Linear
from burnish.errors import CompressionError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder, save_decoder

# What bitsandbytes 0.50.2 gives for `made_weight`: SHA-256 (16 digits) of the packed codes, of the codes of the scales
# with double quantization, and of the float32 weights without it.
GOLDEN = {
    ("nf4", (7, 61)): ("4c81124d713ee3b9", "a3e3c2e891442f98", "89432c272eebeee2"),
    ("nf4", (131, 173)): ("bb7ab47f8fa75345", "1f5c664a3adce729", "0df6013e9ab9abd2"),
    ("fp4", (7, 61)): ("ae856160b8a7651e", "a3e3c2e891442f98", "cf70e2b4301f9e64"),
    ("fp4", (131, 173)): ("efb684f05231f9a2", "1f5c664a3adce729", "bd3c1431087d6644"),
}
GOLDEN_BYTES = "0feeddcba9876543221100ffeedccba9765433211100feeddcba987654322110"
GOLDEN_SCALES = [10, 84, 237, 26, 197, 255, 41]
GOLDEN_OFFSET, GOLDEN_SCALE = 0.3902250826358795, 0.44631460309028625
GOLDEN_WEIGHTS = [
    -0.009811639785766602, 0.009811639785766602, 0.007093391846865416, 0.007093391846865416, 0.005520195234566927,
]  # fmt: skip


def made_weight(shape: tuple[int, int]) -> torch.Tensor:
    """Numbers of any size and sign, the same everywhere."""
    place = torch.arange(shape[0] * shape[1])
    value = ((place * 7919) % 2003 - 1001).float() / 1001
    return (value * (((place // 64 * 37) % 101 + 1).float() / 101)).view(shape)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("kind", "shape"), list(GOLDEN))
def test_codes_and_weights_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int]) -> None:
    packed_digest, scales_digest, weights_digest = GOLDEN[kind, shape]
    weight = made_weight(shape)
    packed = torch.zeros(-(-weight.numel() // 2), dtype=torch.uint8)
    double = quantize_blocks(weight, BlockFormat(kind=kind), packed)
    assert (digest(packed), digest(double.absmax)) == (packed_digest, scales_digest)
    plain_format = BlockFormat(kind=kind, double=False)
    plain = quantize_blocks(weight, plain_format, packed)
    assert digest(dequantize_blocks(packed, plain, plain_format, torch.empty(shape))) == weights_digest


def test_double_quantized_scales_are_those_of_bitsandbytes() -> None:
    layer = Nf4Linear(61, 7)
    layer.quantize_(made_weight((7, 61)))
    assert bytes(layer.packed[:32].tolist()).hex() == GOLDEN_BYTES
    assert layer.absmax.tolist() == GOLDEN_SCALES
    assert layer.absmax_offset is not None
    assert layer.absmax_scale is not None
    assert float(layer.absmax_offset) == pytest.approx(GOLDEN_OFFSET, rel=1e-6)
    assert layer.absmax_scale.tolist() == pytest.approx([GOLDEN_SCALE], rel=1e-6)
    assert layer.dequantized(torch.float32).flatten()[:5].tolist() == pytest.approx(GOLDEN_WEIGHTS, rel=1e-5)


def test_dynamic_type_has_256_levels_closest_together_at_zero() -> None:
    levels = dynamic_levels(torch.device("cpu"))
    assert len(levels) == 256
    assert (levels.diff() > 0).all()
    assert levels[-1] == 1.0
    assert levels[127] == 0.0
    assert levels.diff()[126] < 1e-5 < levels.diff()[-2]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 21), (5, 64), (9, 67), (600, 450)])
@pytest.mark.parametrize("double", [False, True])
def test_any_size_comes_back_within_half_a_step(kind: str, shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0] = 0.0
    block_format = BlockFormat(kind=kind, double=double)
    layer = Nf4Linear(shape[1], shape[0], block_format=block_format)
    layer.quantize_(weight)
    back = layer.dequantized(torch.float32)
    assert back.shape == shape
    # The widest gap between levels is 0.33 of the block's largest; scales in 8 bits add a little.
    assert (back - weight).abs().max() <= (0.17 + 0.03 * double) * weight.abs().max() + 1e-12
    assert torch.equal(layer.dequantized(torch.bfloat16), back.bfloat16())
    out = torch.empty(shape)
    assert layer.dequantized(torch.float32, out_OI=out) is out
    assert torch.equal(out, back)


def test_other_block_sizes_cost_and_lose_as_expected() -> None:
    weight = torch.randn(40, 130, generator=torch.Generator().manual_seed(1))
    errors = []
    for block_size in (32, 128, 1024):
        layer = Nf4Linear(130, 40, block_format=BlockFormat(block_size=block_size, double=False))
        layer.quantize_(weight)
        assert layer.absmax.numel() == -(-40 * 130 // block_size)
        errors.append(float((layer.dequantized(torch.float32) - weight).norm()))
    assert errors == sorted(errors)


def test_bad_weights_and_formats_are_refused() -> None:
    layer = Nf4Linear(8, 8)
    weight = torch.ones(8, 8)
    weight[3, 3] = torch.nan
    with pytest.raises(CompressionError, match=r"model\.q holds 1 NaN or infinite weights"):
        layer.quantize_(weight, name="model.q")
    for settings in ({"kind": "nf3"}, {"block_size": 7}, {"block_size": 0}):
        with pytest.raises(ConfigError):
            BlockFormat(**settings)
        with pytest.raises(ConfigError):
            FrozenFormat(**settings)
    with pytest.raises(ConfigError, match="cannot be read"):
        FrozenFormat.from_dict({"kind": "nf4", "groups": 3})


def layers(bias: bool = True) -> list[FrozenLinear]:
    torch.manual_seed(3)
    linear = torch.nn.Linear(67, 41, bias=bias)
    return [
        Nf4Linear.from_linear(linear),
        Nf4Linear.from_linear(linear, block_format=BlockFormat(kind="fp4", double=False)),
        Int8Frozen.from_linear(linear),
    ]


@pytest.mark.parametrize("index", range(3))
def test_gradient_is_exact_before_and_after_evaluation(index: int) -> None:
    layer = layers()[index]
    weight, bias = layer.dequantized(torch.float32), layer.bias
    x = torch.randn(2, 5, 67, generator=torch.Generator().manual_seed(4))
    grad = torch.randn(2, 5, 41, generator=torch.Generator().manual_seed(5))

    def check() -> None:
        leaf = x.clone().requires_grad_(True)
        out = layer(leaf)
        out.backward(grad)
        assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))
        assert torch.equal(leaf.grad, grad @ weight)

    check()
    for context in (torch.no_grad(), torch.inference_mode()):
        layer.eval()
        with context:
            for _ in range(3):
                layer(x)
        layer.train()
        check()
    assert all(not parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("index", range(3))
def test_backward_keeps_neither_weight_nor_input(index: int) -> None:
    kept: list[torch.Tensor] = []
    layer = layers()[index]
    x = torch.randn(5, 67, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        layer(x)
    assert not kept


def test_autocast_computes_in_its_dtype_and_gives_the_inputs_gradient_back() -> None:
    layer = layers()[0]
    x = torch.randn(5, 67, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("index", range(3))
def test_cast_of_the_model_leaves_the_weights(index: int) -> None:
    layer = layers()[index]
    before = layer.dequantized(torch.float32)
    layer.bfloat16()
    assert torch.equal(layer.dequantized(torch.float32), before)
    state = layer.state_dict()
    again = layers()[index].bfloat16()
    again.load_state_dict(state)
    assert torch.equal(again.dequantized(torch.float32), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama's folder."""
    config = ModelConfig(
        family="llama", vocab_size=97, hidden_size=48, intermediate_size=72, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, rotary_dim=12, max_position_embeddings=64,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("model") / "dense"
    save_decoder(Decoder(config).initialize(std=0.2, seed=0).eval(), place, source=None, dtype=torch.float32)
    return place


@pytest.mark.parametrize("frozen", [FrozenFormat(), FrozenFormat(kind="int8"), FrozenFormat(kind="fp4", double=False)])
def test_loaded_frozen_is_frozen_in_memory(folder: Path, frozen: FrozenFormat) -> None:
    loaded = load_frozen(folder, frozen, dtype=torch.float32)
    dense = load_decoder(folder)
    names = freeze_in_place(dense, frozen)
    assert list(frozen_linears(loaded)) == names
    assert len(names) == 14
    assert isinstance(loaded.lm_head, torch.nn.Linear)
    for name, layer in frozen_linears(loaded).items():
        other = dense.get_submodule(name)
        assert isinstance(other, FrozenLinear)
        assert torch.equal(layer.dequantized(torch.float32), other.dequantized(torch.float32))
        assert format_of(layer) == FrozenFormat.from_dict(frozen.to_dict()) == frozen
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = loaded(tokens)
        assert torch.equal(before, dense(tokens))
        assert dequantize_in_place(loaded) == names
        torch.testing.assert_close(loaded(tokens), before)


def test_loading_frozen_holds_one_dense_linear_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import burnish.compress.frozen_loading as module

    sizes: list[int] = []
    monkeypatch.setattr(
        module, "scratch_for", lambda reader, names: sizes.append(max(reader.info(n).num_bytes for n in names))
        or torch.empty(sizes[-1], dtype=torch.uint8)
    )  # fmt: skip
    decoder = load_frozen(folder, FrozenFormat(), dtype=torch.float32)
    assert sizes == [4 * 48 * 72]
    held = {name: tensor for name, tensor in decoder.state_dict().items() if tensor.dim() == 2}
    assert set(held) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_quantized_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**record, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quantized already"):
        load_frozen(copy, FrozenFormat(), dtype=torch.float32)
