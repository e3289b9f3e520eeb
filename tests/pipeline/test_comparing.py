"""Opening several models beside each other: fingerprints of all their weights, and names that tell them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.data.bundled import bundled_path
from burnish.errors import CheckpointError
from burnish.pipeline import comparing
from burnish.pipeline.comparing import distinct_names, open_compared, threads_each, weights_digest
from burnish.pipeline.manifest import fingerprint_folder
from burnish.pipeline.serving import ServedEngine
from burnish.serve.settings import ServeSettings

BASE = "burnish-sql-base"
_MIB = 1 << 20


def weights(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def adapter(folder: Path, *, alpha: int = 8) -> Path:
    """What there has to be for a folder to count as an adapter on the bundled model."""
    config = {"base_model_name_or_path": BASE, "peft_type": "LORA", "r": 4, "lora_alpha": alpha}
    weights(folder, b"not read here", "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_one_byte_in_the_middle_changes_the_digest(tmp_path: Path) -> None:
    content = bytearray(5 * _MIB)
    one = weights(tmp_path / "one", bytes(content))
    content[5 * _MIB // 2] = 1
    other = weights(tmp_path / "other", bytes(content))
    assert weights_digest(one) != weights_digest(other)
    assert fingerprint_folder(one) == fingerprint_folder(other), "the quick fingerprint would not have seen it"
    assert weights_digest(one) == weights_digest(weights(tmp_path / "copy", bytes(5 * _MIB)))


def test_an_adapter_and_its_scale_count(tmp_path: Path) -> None:
    base = weights(tmp_path / "base", b"base")
    digests = {
        weights_digest(base),
        weights_digest(base, adapter(tmp_path / "a")),
        weights_digest(base, adapter(tmp_path / "b", alpha=16)),
        weights_digest(adapter(tmp_path / "c")),
    }
    assert len(digests) == 4


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        weights_digest(tmp_path)


def open_all(*names: str) -> Any:
    return open_compared(names, ServedEngine(), ServeSettings(), say=lambda line: None)


def test_every_model_is_one_column_with_a_service_of_its_own(tmp_path: Path) -> None:
    tuned = adapter(tmp_path / "tuned")
    (tuned / "burnish.json").write_text('{"data": {"template": "alpaca"}}', encoding="utf-8")
    base, adapted = open_all(BASE, str(tuned))
    assert (base.name, adapted.name) == (BASE, "tuned")
    assert base.service is not adapted.service
    assert (base.template, adapted.template) == ("chat", "alpaca")
    assert adapted.model.parent == BASE
    assert base.digest == weights_digest(bundled_path(BASE))
    assert adapted.digest == weights_digest(bundled_path(BASE), tuned)
    assert "adapter on burnish-sql-base" in adapted.about()
    assert adapted.trouble == "the model is being loaded"


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    models = open_all(str(adapter(tmp_path / "monday" / "merged")), str(adapter(tmp_path / "tuesday" / "merged")), BASE)
    assert [model.name for model in models] == ["monday/merged", "tuesday/merged", BASE]
    assert [model.name for model in distinct_names([models[2], models[2]])] == [f"{BASE} (1)", f"{BASE} (2)"]


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="is no model"):
        open_all(BASE, "/nowhere/at/all")


def test_engines_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "usable_cores", lambda: 8)
    assert [threads_each(engines) for engines in (1, 2, 3, 20)] == [8, 4, 2, 1]
