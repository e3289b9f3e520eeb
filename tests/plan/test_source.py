"""Names of models to shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.errors import CheckpointError
from burnish.models.shapes import SHAPES
from burnish.plan.source import find_model, source_of


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPES["135m"], **changes}))
    return folder


def test_published_shape_is_found_by_name() -> None:
    source = find_model("mistral-7b")
    assert source.config.num_parameters() == 7241732096
    assert source.folder is None
    assert source.disk_bytes is None


def test_folder_gives_dtype_and_disk_bytes(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", torch_dtype="bfloat16")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    source = find_model(folder)
    assert (source.stored_dtype, source.disk_bytes, source.weight_format) == ("bfloat16", 1000, None)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
        ({"quant_method": "gptq", "bits": 3}, None),
    ],
)
def test_quantized_config_gives_its_format(record: dict[str, object], expected: str | None) -> None:
    assert source_of("m", {**SHAPES["135m"], "quantization_config": record}).weight_format == expected


def test_stories_model_has_its_published_count(shared_data: Path) -> None:
    source = find_model(shared_data / "models" / "stories260k")
    assert source.config.num_parameters() == 260032
    assert source.disk_bytes is not None


@pytest.mark.parametrize("name", ["no-such-model", "./missing/folder", "~/missing"])
def test_unknown_name_lists_the_shapes(name: str) -> None:
    with pytest.raises(CheckpointError, match="mistral-7b"):
        find_model(name)


def test_file_is_not_a_model(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m")
    with pytest.raises(CheckpointError, match="Give its folder"):
        find_model(folder / "config.json")


def test_hub_id_offline_without_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing@v1"):
        find_model("nobody/nothing@v1", offline=True)


def test_broken_config_names_the_model(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", hidden_size="wide")
    with pytest.raises(CheckpointError, match=r"m: config\.json"):
        find_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        find_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_model(folder)
