"""Names of models to shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.errors import CheckpointError
from burnish.models.shapes import SHAPES
from burnish.plan.source import find_model, quantization_label, source_of


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPES["135m"], **changes}))
    return folder


def compressed(bits: int, *, activations: int | None = None, group_size: int | None = None) -> dict[str, object]:
    """A quantization_config of compressed-tensors with a group for the embedding before the one for all linears."""
    inputs = None if activations is None else {"num_bits": activations}
    main = {"targets": ["Linear"], "weights": {"num_bits": bits, "group_size": group_size}, "input_activations": inputs}
    embedding = {"targets": ["model.embed_tokens"], "weights": {"num_bits": 8}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": embedding, "group_1": main}}


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
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4"),
        ({"quant_method": "gptq", "bits": 3}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None),
        (compressed(8, activations=8), "w8a8"),
        (compressed(8), "int8"),
        (compressed(4, group_size=32), "int4"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
    ],
)
def test_quantized_config_gives_its_format(record: dict[str, object], expected: str | None) -> None:
    assert source_of("m", {**SHAPES["135m"], "quantization_config": record}).weight_format == expected


@pytest.mark.parametrize(
    ("record", "label", "group_size"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "gptq-4bit", 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit", None),
        (compressed(8, activations=8), "compressed-tensors-w8a8", -1),
        (compressed(4, group_size=32), "compressed-tensors-w4a16", 32),
        ({"quant_method": "hqq"}, "hqq", None),
    ],
)
def test_quantized_folders_are_named(record: dict[str, object], label: str, group_size: int | None) -> None:
    hf_config = {**SHAPES["135m"], "quantization_config": record}
    assert (quantization_label(hf_config), source_of("m", hf_config).group_size) == (label, group_size)


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
