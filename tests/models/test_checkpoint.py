"""Corrupt, hostile and incomplete weight files end in one line that names the file and the tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorReader, read_config, read_header


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, valid or not."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one_line(error: pytest.ExceptionInfo[CheckpointError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors"
    )
    return tmp_path


def test_tensors_read_equal_in_their_own_and_in_another_dtype(weights: Path) -> None:
    reader = TensorReader(weights)
    assert sorted(reader.names()) == ["a", "b"]
    assert torch.equal(reader.read("a"), torch.arange(6.0).reshape(2, 3))
    assert reader.read("b").dtype == torch.bfloat16
    assert torch.equal(reader.read("a", dtype=torch.float16), torch.arange(6.0).reshape(2, 3).half())
    destination = torch.empty(3, 2).t()
    reader.read_into("a", destination)
    assert torch.equal(destination, torch.arange(6.0).reshape(2, 3))


def test_large_tensor_converts_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.models.checkpoint.CHUNK_BYTES", 64)
    values = torch.randn(37, 11)
    save_file({"a": values, "b": values.clone()}, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.read("a", dtype=torch.bfloat16), values.bfloat16())
    assert reader.same("a", "b")


def test_same_sees_one_different_element(tmp_path: Path) -> None:
    values = torch.randn(9)
    other = values.clone()
    other[8] += 1
    save_file({"a": values, "b": other, "c": values.half()}, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert not reader.same("a", "b")
    assert not reader.same("a", "c")


def test_truncated_file_raises(weights: Path) -> None:
    path = weights / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError) as error:
        TensorReader(weights)
    one_line(error, str(path), "truncated")


def test_bytes_that_no_tensor_owns_raise(weights: Path) -> None:
    path = weights / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"xxx")
    with pytest.raises(CheckpointError) as error:
        TensorReader(weights)
    one_line(error, str(path), "no tensor owns")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a safetensors file"),
        (b"\x01\x02", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (struct.pack("<Q", 9) + b"not json!", "corrupt safetensors header"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "corrupt safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "corrupt safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "not a safetensors file"),
    ],
)
def test_bad_header_raises(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, str(path), part)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ({"w": entry(shape=(3,))}, "shape that its bytes do not fill"),
        ({"w": entry(dtype="F31")}, "unknown dtype"),
        ({"w": entry(shape=(-2,))}, "malformed"),
        ({"w": entry(shape=(2.0,))}, "malformed"),
        ({"w": entry(offsets=(0,))}, "malformed"),
        ({"w": {"dtype": "F32"}}, "malformed"),
        ({"w": 7}, "malformed"),
        ({"w": entry(shape=(1,), offsets=(4, 8))}, "overlaps another tensor or leaves a gap"),
        ({"w": entry(), "v": entry()}, "overlaps another tensor or leaves a gap"),
        ({"w": entry(shape=(4,), offsets=(0, 16))}, "truncated"),
    ],
)
def test_header_entry_that_cannot_be_raises(tmp_path: Path, header: Any, part: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    one_line(error, str(path), part)


def make_shards(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert sorted(TensorReader(tmp_path).names()) == ["a", "b"]


def test_missing_shard_raises(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "evil.safetensors")
    make_shards(folder, {"a": shard})
    with pytest.raises(CheckpointError) as error:
        TensorReader(folder)
    one_line(error, "index.json", "outside its folder")


def test_index_that_promises_a_tensor_its_shard_lacks_raises(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, "lacks c")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": 3}', "not json"])
def test_malformed_index_raises(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, "index.json")


def test_folder_without_weights_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, str(tmp_path), "no weights")


def test_pickled_weights_need_the_flag(tmp_path: Path) -> None:
    values = torch.randn(3, 2)
    torch.save({"a": values}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path)
    one_line(error, "pytorch_model.bin", "--allow-pickle")
    assert torch.equal(TensorReader(tmp_path, allow_pickle=True).read("a"), values)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("this must never run",))


def test_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path, allow_pickle=True)
    one_line(error, "pytorch_model.bin")
    assert "never run" not in capsys.readouterr().out


def test_truncated_pickle_raises(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError) as error:
        TensorReader(tmp_path, allow_pickle=True)
    one_line(error, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("content", "part"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_bad_config_json_raises(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    one_line(error, "config.json", part)


def test_config_of_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path / "nowhere")
    one_line(error, "nowhere", "not a model folder")
