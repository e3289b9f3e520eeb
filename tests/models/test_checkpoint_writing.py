"""What is written is whole or absent, and the safetensors library reads it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from burnish.errors import CapacityError, CheckpointError
from burnish.models.checkpoint import TensorReader
from burnish.models.checkpoint_writing import PendingTensor, pending, write_safetensors, write_safetensors_folder


def tensors(*, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "small": torch.randn(3, generator=generator).bfloat16(),
        "ints": torch.arange(7, dtype=torch.int32),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "large": torch.randn(20, 11, generator=generator),
        "strided": torch.randn(5, 6, generator=generator).t(),
    }


def test_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    state = tensors()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {name: pending(tensor) for name, tensor in state.items()})
    loaded = load_file(path)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_floating_tensors_take_the_wanted_dtype_and_integers_keep_theirs(tmp_path: Path) -> None:
    write_safetensors_folder(tmp_path, {n: pending(t, dtype=torch.float16) for n, t in tensors().items()})
    reader = TensorReader(tmp_path)
    assert reader.info("large").dtype == torch.float16
    assert reader.info("ints").dtype == torch.int32


def test_shards_have_an_index_and_respect_the_limit(tmp_path: Path) -> None:
    state = tensors()
    paths = write_safetensors_folder(tmp_path, {n: pending(t) for n, t in state.items()}, max_shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(paths) == 3
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.read(name), state[name]) for name in state)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    state = {name: pending(tensor) for name, tensor in tensors().items()}
    write_safetensors_folder(tmp_path, state, max_shard_bytes=200)
    write_safetensors_folder(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    write_safetensors_folder(tmp_path, state, max_shard_bytes=200)
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": pending(torch.ones(2))})

    def fail() -> Tensor:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_safetensors(path, {"a": pending(torch.zeros(2)), "b": PendingTensor((2,), torch.float32, fail)})
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_full_disk_is_one_line_and_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CapacityError) as error:
        write_safetensors(tmp_path / "model.safetensors", {"a": pending(torch.ones(2))})
    assert "no space left" in str(error.value)
    assert "model.safetensors" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        write_safetensors_folder(tmp_path / "file" / "model", {"a": pending(torch.ones(2))})


def test_tensor_that_changed_its_shape_raises(tmp_path: Path) -> None:
    wrong = PendingTensor((2, 3), torch.float32, lambda: torch.ones(3, 2))
    with pytest.raises(CheckpointError, match="a changed its shape"):
        write_safetensors(tmp_path / "model.safetensors", {"a": wrong})
