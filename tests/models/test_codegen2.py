"""CodeGen 2 keeps its fused rows in 8 blocks where transformers' class expects 4; config.json tells which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.loading import load_config, load_decoder, save_decoder


def reorder(fused: Tensor, *, old: int, new: int) -> Tensor:
    """Rows of (q, v, k) per block, from `old` blocks to `new` blocks."""
    hidden = fused.shape[1]
    query, value, key = fused.view(old, 3, hidden // old, hidden).unbind(1)
    parts = [part.reshape(new, hidden // new, hidden) for part in (query, value, key)]
    return torch.stack(parts, dim=1).reshape(3 * hidden, hidden)


@pytest.fixture
def codegen2(tiny_model: Callable[[str], Any], tmp_path: Path) -> Path:
    source = tiny_model("codegen").folder
    state = load_file(source / "model.safetensors")
    for name in state:
        if "qkv_proj" in name:
            state[name] = reorder(state[name], old=4, new=8)
    folder = tmp_path / "codegen2"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    record = json.loads((source / "config.json").read_text())
    record |= {"head_dim": 12, "auto_map": {"AutoModelForCausalLM": "modeling_codegen.CodeGenForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_logits_equal_transformers_after_reordering(codegen2: Path, tiny_model: Callable[[str], Any]) -> None:
    expected = tiny_model("codegen")
    decoder = load_decoder(codegen2)
    assert decoder.config.fused_qkv_blocks == 8
    with torch.no_grad():
        assert (decoder(expected.tokens_BT) - expected.logits_BTV).abs().max() < 1e-4


def test_saved_folder_keeps_its_blocks(codegen2: Path, tmp_path: Path) -> None:
    before = load_file(codegen2 / "model.safetensors")
    for source, out in ((codegen2, tmp_path / "with-source"), (None, tmp_path / "from-config")):
        save_decoder(load_decoder(codegen2), out, source=source)
        assert load_config(out).fused_qkv_blocks == 8
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "blocks"), [({}, 4), ({"head_dim": 12}, 8), ({"mp_num": 2}, 2), ({"mp_num": 4, "head_dim": 12}, 4)]
)
def test_config_tells_the_number_of_blocks(
    change: dict[str, Any], blocks: int, tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    record = json.loads((tiny_model("codegen").folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert load_config(tmp_path).fused_qkv_blocks == blocks


def test_heads_that_do_not_divide_into_blocks_raise(tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    record = json.loads((tiny_model("codegen").folder / "config.json").read_text()) | {"mp_num": 3}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="multiple of 3"):
        load_config(tmp_path)
