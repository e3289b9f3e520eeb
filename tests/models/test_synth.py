"""Synthetic models load, repeat by seed, and come with a tokenizer of their vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from burnish.data.tokenizer import Tokenizer
from burnish.errors import ConfigError
from burnish.models.checkpoint import TensorReader
from burnish.models.loading import load_decoder
from burnish.models.shapes import SHAPES
from burnish.models.synth import random_tensors, write_random_checkpoint

TINY: dict[str, Any] = {
    **SHAPES["135m"],
    "vocab_size": 700,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "bos_token_id": 1,
    "eos_token_id": 300,
}


def test_folder_loads_here_and_in_transformers(tmp_path: Path, load_in_transformers: Callable[[Path], Any]) -> None:
    write_random_checkpoint(TINY, tmp_path, dtype="float32", max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens_BT = torch.tensor([[1, 60, 77]])
    with torch.no_grad():
        logits_BTV = load_decoder(tmp_path)(tokens_BT)
        assert torch.allclose(logits_BTV, load_in_transformers(tmp_path)(tokens_BT).logits, atol=1e-5)


def test_weights_have_the_promised_spread(tmp_path: Path) -> None:
    write_random_checkpoint(TINY, tmp_path)
    reader = TensorReader(tmp_path)
    embedding = reader.read("model.embed_tokens.weight").float()
    assert reader.info("model.embed_tokens.weight").dtype == torch.bfloat16
    assert abs(embedding.std() - 0.02) < 0.001
    assert torch.equal(reader.read("model.norm.weight"), torch.ones(96, dtype=torch.bfloat16))
    up, gate = (reader.read(f"model.layers.0.mlp.{name}_proj.weight") for name in ("up", "gate"))
    assert not torch.equal(up, gate)


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(TINY, tmp_path / name, seed=seed)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_tensors_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.models.hf_config import config_of

    made: list[torch.Size] = []
    empty = torch.empty

    def spy(*args: Any, **settings: Any) -> torch.Tensor:
        tensor = empty(*args, **settings)
        if tensor.device.type != "meta":
            made.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    tensors = random_tensors(config_of(SHAPES["mistral-7b"]), seed=0, dtype=torch.bfloat16)
    assert not made
    assert sum(tensor.num_bytes for tensor in tensors.values()) == 2 * 7_241_732_096
    tensors["model.layers.0.self_attn.k_proj.weight"].make()
    assert made == [torch.Size([1024, 4096])]


@pytest.mark.parametrize("shape", [{}, {"bos_token_id": 0, "eos_token_id": 0}, {"bos_token_id": None}])
def test_tokenizer_round_trips_any_text_and_decodes_every_id(shape: dict[str, Any], tmp_path: Path) -> None:
    write_random_checkpoint({**TINY, **shape}, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == TINY["vocab_size"]
    assert tokenizer.eos_id == shape.get("eos_token_id", 300)
    assert tokenizer.bos_id == shape.get("bos_token_id", 1)
    text = "SELECT * FROM café WHERE x > '→ 😀';\n\t  end"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(tokenizer.vocab_size))
    if tokenizer.bos_id is not None:
        assert tokenizer.encode_prompt("hi")[0] == tokenizer.bos_id
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"


def test_tokenizer_equals_transformers(tmp_path: Path) -> None:
    write_random_checkpoint(TINY, tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "größer than\n ever"
    assert reference(text).input_ids == tokenizer.encode(text, add_special_tokens=True)
    assert len(reference) == TINY["vocab_size"]


def test_vocabulary_without_room_for_bytes_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        write_random_checkpoint({**TINY, "vocab_size": 200}, tmp_path)


def test_dtype_auto_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a dtype"):
        write_random_checkpoint(TINY, tmp_path, dtype="auto")


def test_config_says_the_dtype(tmp_path: Path) -> None:
    write_random_checkpoint(TINY, tmp_path, dtype="float16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
