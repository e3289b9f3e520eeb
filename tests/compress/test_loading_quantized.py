"""Folders as other programs write them, made here by changing what our own writer wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import quantized_linears, save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.errors import CheckpointError
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

LAYER = "model.layers.0.mlp.down_proj"
Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture
def quantized(make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path) -> tuple[Path, Decoder]:
    """A saved 4-bit folder with ordered groups, and the model it was saved from."""
    decoder = make_decoder()
    config = QuantizeConfig(bits=4, group_size=16, symmetric=False, activation_order=True)
    quantize_model(decoder, examples, config)
    save_quantized(decoder, tmp_path / "child", source=None, config=config)
    return tmp_path / "child", decoder


def _rewrite(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    record = json.loads((folder / "config.json").read_text())
    edit(tensors, record["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(record))


def _logits(decoder: Decoder, examples: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return decoder(torch.tensor([examples[0]]))


def test_dense_folder_loads_as_load_decoder_does(decoder_folder: Path, examples: list[list[int]]) -> None:
    assert torch.equal(_logits(load_model(decoder_folder), examples), _logits(load_decoder(decoder_folder), examples))


def test_ordered_groups_are_read(quantized: tuple[Path, Decoder], examples: list[list[int]]) -> None:
    folder, decoder = quantized
    assert torch.equal(_logits(load_model(folder, dtype="float32"), examples), _logits(decoder, examples))


def test_zero_points_of_the_second_version_are_read(
    quantized: tuple[Path, Decoder], examples: list[list[int]], tmp_path: Path
) -> None:
    folder, decoder = quantized

    def edit(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        record["checkpoint_format"] = "gptq_v2"
        for name in [name for name in tensors if name.endswith("qzeros")]:
            # Every 4-bit field plus one; our writer leaves no field at 15, so nothing carries.
            tensors[name] = tensors[name] + 0x11111111

    _rewrite(folder, edit)
    loaded = load_model(folder, dtype="float32")
    # 12 of 13 groups' worth of words are full; the filling of the last word must not matter either.
    assert torch.equal(_logits(loaded, examples), _logits(decoder, examples))
    # Saved again it is the first version.
    config = QuantizeConfig(bits=4, group_size=16, symmetric=False, activation_order=True)
    save_quantized(loaded, tmp_path / "again", source=folder, config=config)
    assert torch.equal(_logits(load_model(tmp_path / "again", dtype="float32"), examples), _logits(decoder, examples))


def test_missing_group_order_means_plain_order(
    make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path
) -> None:
    decoder = make_decoder()
    config = QuantizeConfig(bits=4, group_size=16)
    quantize_model(decoder, examples, config)
    save_quantized(decoder, tmp_path, source=None, config=config)

    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    _rewrite(tmp_path, edit)
    assert torch.equal(_logits(load_model(tmp_path, dtype="float32"), examples), _logits(decoder, examples))


def test_bias_that_the_architecture_lacks_is_read(quantized: tuple[Path, Decoder], examples: list[list[int]]) -> None:
    folder, decoder = quantized

    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{LAYER}.bias"] = torch.full((40,), 0.25)

    _rewrite(folder, edit)
    loaded = load_model(folder, dtype="float32")
    layer = quantized_linears(loaded)[LAYER]
    assert layer.bias is not None
    assert not torch.equal(_logits(loaded, examples), _logits(decoder, examples))


def test_scales_of_another_dtype_are_not_rounded(quantized: tuple[Path, Decoder]) -> None:
    folder, _ = quantized
    odd = torch.full((4, 40), 1.0 + 2.0**-20)

    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{LAYER}.scales"] = odd

    _rewrite(folder, edit)
    layer = quantized_linears(load_model(folder, dtype="float32"))[LAYER]
    assert torch.equal(layer.quantized().scales, odd.t())


def test_excluded_modules_stay_dense(
    quantized: tuple[Path, Decoder], make_decoder: Callable[..., Decoder], examples: list[list[int]]
) -> None:
    folder, decoder = quantized
    dense = make_decoder().get_submodule(LAYER)

    def edit(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        record["dynamic"] = {f"-:{LAYER}": {}}
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{LAYER}.{suffix}"]
        tensors[f"{LAYER}.weight"] = dense.weight.data.clone()  # pyright: ignore

    _rewrite(folder, edit)
    loaded = load_model(folder, dtype="float32")
    assert LAYER not in quantized_linears(loaded)
    expected = decoder
    expected.model.layers[0].mlp.down_proj = dense  # pyright: ignore
    assert torch.equal(_logits(loaded, examples), _logits(expected, examples))


def test_bfloat16_keeps_the_packed_weights(quantized: tuple[Path, Decoder], examples: list[list[int]]) -> None:
    folder, decoder = quantized
    loaded = load_model(folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    for name, layer in quantized_linears(loaded).items():
        assert torch.equal(layer.dequantize(), quantized_linears(decoder)[name].dequantize())
    near, exact = _logits(loaded, examples).float(), _logits(decoder, examples)
    assert (near - exact).abs().mean() < 0.05 * exact.abs().mean()


def _drop(name: str) -> Edit:
    return lambda tensors, _: tensors.__delitem__(name)


def _set(**changes: Any) -> Edit:
    return lambda _, record: record.update(changes)


def _put(name: str, tensor: Tensor) -> Edit:
    return lambda tensors, _: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop(f"{LAYER}.qzeros"), rf"lacks {LAYER}\.qzeros"),
        (_drop(f"{LAYER}.qweight"), LAYER),
        (_set(bits=8), "does not hold 8-bit weights of .* input features"),
        (_set(group_size=64), r"scales|qzeros"),
        (_set(quant_method="bitsandbytes"), "says bitsandbytes, but no weight is quantized"),
        (_set(quant_method="hqq"), "cannot be read; got 'hqq'"),
        (_set(dynamic={"-:.*down_proj": {}}), "is packed, but config.json says it is dense"),
        (_put(f"{LAYER}.g_idx", torch.full((52,), 4, dtype=torch.int32)), rf"{LAYER}: g_idx names a group"),
        (_put(f"{LAYER}.scales", torch.ones(4, 7)), r"scales has the wrong shape"),
        (_put("model.layers.0.mlp.strange.qweight", torch.zeros(2, 2, dtype=torch.int32)), "strange"),
    ],
    ids=[
        "no-zeros",
        "no-weight",
        "bits",
        "group-size",
        "method",
        "unknown-method",
        "excluded",
        "order",
        "shape",
        "unknown",
    ],
)
def test_damaged_folder_is_refused_by_name(quantized: tuple[Path, Decoder], edit: Edit, message: str) -> None:
    folder, _ = quantized
    _rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, dtype="float32")


def test_quantization_config_beside_dense_weights_is_refused(decoder_folder: Path) -> None:
    path = decoder_folder / "config.json"
    record = json.loads(path.read_text())
    record["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="no weight is packed"):
        load_model(decoder_folder)
