"""Parts of every family's files: what each rank reads is its cut of the whole, and no more bytes than that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.compress.int8_linear import Int8Linear, quantize_rows
from burnish.compress.loading import load_model
from burnish.compress.shard_loading import load_part, survey
from burnish.errors import CheckpointError, ConfigError
from burnish.models.shard_cut import ShardCut, cut_model


def nothing(_: torch.Tensor) -> None:
    """There is nobody to agree with."""


def cut_of(whole: torch.Tensor, name: str, cut: ShardCut, found: object) -> torch.Tensor:
    outs, ins = cut.spans(name.rpartition(".")[0], found.config)  # type: ignore[attr-defined]
    part = whole if outs is None else whole[slice(*outs)]
    return part if ins is None or part.dim() < 2 else part[:, slice(*ins)]


@pytest.mark.parametrize("ways", [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_parts_are_cuts_of_the_whole(tiny: Any, ways: tuple[int, int]) -> None:
    found = survey(tiny.folder, dtype=torch.float32, quantize="none")
    whole = load_model(tiny.folder, dtype=torch.float32).state_dict()
    num_bytes = sum(tensor.nbytes for tensor in whole.values())
    seen: set[str] = set()
    for cut in cut_model(found.config, tensor_parallel=ways[0], pipeline_parallel=ways[1], units=found.units):
        part = load_part(found, cut, device=torch.device("cpu"), agree=nothing)
        state = part.decoder.state_dict()
        for name, tensor in state.items():
            assert torch.equal(tensor, cut_of(whole[name], name, cut, found)), name
        assert part.bytes_read == sum(tensor.nbytes for tensor in state.values())
        assert part.bytes_read < 0.7 * num_bytes
        seen |= set(state)
    assert seen == set(whole)


def test_damaged_folders_are_refused_as_one_process_does(tiny_model: object, tmp_path: Path) -> None:
    source: Path = tiny_model("llama").folder  # type: ignore[operator]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        found = survey(tmp_path, dtype=torch.float32, quantize="none")
        cut = cut_model(found.config, tensor_parallel=2, pipeline_parallel=1)[1]
        load_part(found, cut, device=torch.device("cpu"), agree=nothing)

    load()
    for changes, text in (
        ({"num_hidden_layers": 4}, "lacks model.layers.3"),
        ({"num_hidden_layers": 2}, "no place for: model.layers.2"),
        ({"intermediate_size": 58}, "wrong shape"),
        ({"vocab_size": 103}, "wrong shape"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load(**changes)
    with pytest.raises(ConfigError, match="quantize is not known"):
        survey(tmp_path, dtype=torch.float32, quantize="int5")


def test_a_tensor_of_another_shape_is_refused_while_rounding_too(tiny_model: object, tmp_path: Path) -> None:
    source: Path = tiny_model("llama").folder  # type: ignore[operator]
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    for quantize in ("none", "int8"):
        found = survey(tmp_path, dtype=torch.float32, quantize=quantize)
        cut = cut_model(found.config, tensor_parallel=2, pipeline_parallel=1)[0]
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the wrong shape"):
            load_part(found, cut, device=torch.device("cpu"), agree=nothing)


def test_rows_of_zeros_and_of_one_value_are_rounded_as_in_one_process(tiny_model: object, tmp_path: Path) -> None:
    source: Path = tiny_model("llama").folder  # type: ignore[operator]
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"][0] = 0.0
    tensors[f"{name}.weight"][1] = -0.25
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    found = survey(tmp_path, dtype=torch.float32, quantize="int8")
    weight_OI = tensors[f"{name}.weight"].float()
    ints_OI, scale_O = torch.empty(weight_OI.shape, dtype=torch.int8), torch.empty(weight_OI.shape[0])
    quantize_rows(weight_OI, ints_OI, scale_O)
    for cut in cut_model(found.config, tensor_parallel=2, pipeline_parallel=1):
        begin, end = cut.inner

        def agree(peak_O: torch.Tensor, begin: int = begin, end: int = end) -> None:
            if len(peak_O) == len(weight_OI) and torch.equal(peak_O, weight_OI[:, begin:end].abs().amax(dim=1)):
                peak_O.copy_(weight_OI.abs().amax(dim=1))

        layer = load_part(found, cut, device=torch.device("cpu"), agree=agree).decoder.get_submodule(name)
        assert isinstance(layer, Int8Linear)
        assert torch.equal(layer.weight, ints_OI[:, begin:end])
        assert torch.equal(layer.weight_scale, scale_O)
