"""What is served is what was made: names, adapters, and the tokens of the manifest."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError, ConfigError
from burnish.pipeline.manifest import write_manifest

pytest.importorskip("fastapi", reason="the extra serve brings it")
from burnish.pipeline.serving import ServedEngine, open_served

BASE = "burnish-sql-base"
ENGINE = ServedEngine()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder as our stages leave one."""
    folder = tmp_path / "made"
    shutil.copytree(bundled_path(BASE), folder)
    write_manifest(folder, kind="merged", inputs={}, config={}, figures={}, tokenizer=Tokenizer.load(folder))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "sql"
    folder.mkdir()
    record = {
        "base_model_name_or_path": BASE,
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def edit(path: Path, change: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_an_artifact_is_served_under_its_folders_name(artifact: Path) -> None:
    served = open_served(str(artifact), ENGINE)
    [model] = served.models
    assert (model.name, model.adapter, len(model.fingerprint)) == ("made", None, 64)
    assert open_served(str(artifact), ENGINE, name="mine").models[0].name == "mine"
    assert open_served(BASE, ENGINE).models[0].name == BASE
    assert pickle.loads(pickle.dumps(served.make_engine))().tokenizer is not None


def test_other_tokens_than_the_manifests_are_refused(artifact: Path) -> None:
    # The same vocabulary with two tokens changed for each other: everything loads, and every answer would be wrong.
    def swap(record: Any) -> None:
        vocabulary = record["model"]["vocab"]
        first, second = record_tokens[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    tokenizer = Tokenizer.load(artifact)
    golden = json.loads((artifact / "burnish.json").read_text(encoding="utf-8"))["golden_tokens"]
    record_tokens = [tokenizer.token(token_id) for token_id in golden["ids"]]
    edit(artifact / "tokenizer.json", swap)
    with pytest.raises(CheckpointError, match="made with another tokenizer"):
        open_served(str(artifact), ENGINE)


def test_another_chat_template_than_the_manifests_is_refused(artifact: Path) -> None:
    edit(artifact / "tokenizer_config.json", lambda record: record.update(chat_template="{{ messages }}"))
    with pytest.raises(CheckpointError, match="another chat template"):
        open_served(str(artifact), ENGINE)


def test_a_tokenizer_that_is_gone_is_missed(artifact: Path) -> None:
    (artifact / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="there is none now"):
        open_served(str(artifact), ENGINE)


@pytest.mark.parametrize("golden", [{"text": 3, "ids": []}, {"text": "a"}])
def test_a_malformed_manifest_is_named(artifact: Path, golden: dict[str, Any]) -> None:
    edit(artifact / "burnish.json", lambda record: record.update(golden_tokens=golden))
    with pytest.raises(CheckpointError, match="golden_tokens"):
        open_served(str(artifact), ENGINE)


def test_adapters_are_models_of_their_own(adapter: Path) -> None:
    served = open_served(BASE, ENGINE, adapters={"tuned": str(adapter)})
    assert [(model.name, model.adapter, model.parent) for model in served.models] == [
        (BASE, None, None),
        ("tuned", "tuned", BASE),
    ]
    assert open_served(str(adapter), ENGINE).models == (
        served.models[0],
        served.models[1].__class__(
            name="sql",
            root=str(adapter),
            fingerprint=served.models[1].fingerprint,
            adapter="sql",
            parent=BASE,
        ),
    )


def test_what_does_not_fit_together_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter"):
        open_served(BASE, ENGINE, adapters={"x": str(tmp_path)})
    with pytest.raises(ConfigError, match="two models are called"):
        open_served(BASE, ENGINE, adapters={BASE: str(adapter)})
    with pytest.raises(ConfigError, match="no adapter"):
        open_served(BASE, ENGINE, base=BASE)
    with pytest.raises(CheckpointError):
        open_served(str(tmp_path / "nowhere"), ENGINE)


def test_the_process_that_answers_http_needs_no_torch() -> None:
    code = (
        "import sys; from burnish.pipeline.serving import *; from burnish.serve.app import make_app;"
        "from burnish.serve import server; open_served('burnish-sql-base', ServedEngine());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
