"""Exports to other programs' formats, and the gate that runs those programs where they are installed."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from burnish.cli.main import run
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.engine.native import NativeEngine
from burnish.engine.protocol import make_engine
from burnish.engine.sampling import SamplingParams
from burnish.errors import CheckpointError, ConfigError, GateError
from burnish.measure.compare import GateLimits
from burnish.models.loading import load_decoder
from burnish.pipeline.export import export
from burnish.pipeline.foreign_models import LlamaCppModel
from tiny_llama import write_tiny_llama

PROMPTS = [[7, 9, 400, 12], [900, 33], [5 + n for n in range(1, 20)]]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    decoder = load_decoder(tiny)
    config = QuantizeConfig(method="rtn", bits=4, group_size=32)
    quantize_model(decoder, None, config)
    save_quantized(decoder, folder, source=tiny, config=config)
    return folder


def greedy(folder: Path) -> list[Any]:
    return [one.token_ids for one in NativeEngine(folder, dtype="float32").generate(PROMPTS, GREEDY)]


def test_a_packed_model_becomes_a_dense_folder_that_transformers_loads(
    packed: Path, held_out_file: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    record = export(str(packed), to="safetensors", out=tmp_path / "dense", data=str(held_out_file))
    assert record.gate is not None
    assert record.gate.passed
    assert record.gate.kl_mean == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tokens_BT = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        ours = load_model(packed, dtype="float32")(tokens_BT)
        theirs = model(tokens_BT).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("which", ["dense", "packed"])
def test_ctranslate2_gives_the_same_greedy_tokens(
    which: str, tiny: Path, packed: Path, held_out_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    pytest.importorskip("transformers", reason="the converter needs transformers")
    model, out = tiny if which == "dense" else packed, tmp_path / "out" / "ct2"
    record = export(str(model), to="ctranslate2", format="float32", out=out, data=str(held_out_file))
    assert record.gate is not None
    assert record.gate.kl_mean < 1e-6
    assert [file.name for file in out.parent.iterdir()] == ["ct2"]
    outputs = list(make_engine(out, engine="ctranslate2", threads=1).generate(PROMPTS, GREEDY))
    assert [one.token_ids for one in outputs] == greedy(model)


def test_int8_for_ctranslate2_is_smaller_and_close(tiny: Path, held_out_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    pytest.importorskip("transformers", reason="the converter needs transformers")
    record = export(
        str(tiny),
        to="ctranslate2",
        out=tmp_path / "ct2",
        data=str(held_out_file),
        limits=GateLimits(max_kl_mean=0.05, min_greedy_agreement=0.9),
    )
    assert record.format == "int8"
    assert record.gate is not None
    assert 0 < record.gate.kl_mean < 0.05
    assert (tmp_path / "ct2" / "model.bin").stat().st_size < 0.5 * (tiny / "model.safetensors").stat().st_size


def test_without_llama_cpp_a_gguf_file_is_not_compared_and_says_so(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    if find_spec("llama_cpp") is not None:
        pytest.skip("llama-cpp-python is installed")
    out = tmp_path / "files" / "tiny.gguf"
    assert run(["export", str(tiny), "--to", "gguf", "--out", str(out), "--quiet"]) == 0
    assert "not compared: llama.cpp is not installed" in capsys.readouterr().out
    assert sorted(file.name for file in out.parent.iterdir()) == ["tiny.gguf", "tiny.gguf.burnish.json"]
    manifest = json.loads((out.parent / "tiny.gguf.burnish.json").read_text(encoding="utf-8"))
    assert manifest["kind"] == "exported"
    assert manifest["config"] == {"to": "gguf", "format": "q8_0"}
    assert manifest["gate"] is None


class FakeLlama:
    """As much of llama-cpp-python as the gate uses; computes with the source, and `noise`."""

    folder: Path
    noise = 0.0

    def __init__(self, *, model_path: str, n_ctx: int, logits_all: bool, **_: Any) -> None:
        assert Path(model_path).read_bytes()[:4] == b"GGUF"
        assert logits_all
        self.scores = np.zeros((n_ctx, 3072), dtype=np.float32)
        self._decoder = load_decoder(self.folder, dtype="float32")

    def reset(self) -> None:
        self.scores[:] = 0

    def eval(self, tokens: list[int]) -> None:
        logits = self._decoder(torch.tensor([tokens]))[0]
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        self.scores[: len(tokens)] = (logits + self.noise * noise).numpy()


def test_llama_cpp_judges_a_gguf_file_where_it_is_installed(
    tiny: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    library = ModuleType("llama_cpp")
    library.__spec__ = ModuleSpec("llama_cpp", None)
    library.Llama = FakeLlama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    FakeLlama.folder = tiny
    record = export(str(tiny), to="gguf", out=tmp_path / "a.gguf", data=str(held_out_file))
    assert record.gate is not None
    assert record.gate.passed
    monkeypatch.setattr(FakeLlama, "noise", 3.0)
    with pytest.raises(GateError, match="marked as failed"):
        export(str(tiny), to="gguf", out=tmp_path / "b.gguf", data=str(held_out_file))
    manifest = json.loads((tmp_path / "b.gguf.burnish.json").read_text(encoding="utf-8"))
    assert manifest["gate"]["verdict"] == "fail"


@pytest.mark.parametrize("format", ["f16", "q8_0"])
def test_llama_cpp_itself_agrees(format: str, held_out_file: Path, tmp_path: Path) -> None:
    """Runs where llama-cpp-python is installed; docs/formats.md says what llama.cpp was run on, and when."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    out = tmp_path / "model.gguf"
    record = export("burnish-sql-base", to="gguf", format=format, out=out, data=str(held_out_file))
    assert record.gate is not None
    assert record.gate.passed
    model, ids = LlamaCppModel(out, window=64, threads=1), PROMPTS[2]
    for _ in range(12):
        ids = [*ids, int(model.hidden(torch.tensor([ids]))[0, -1].argmax())]
    ours = next(NativeEngine("burnish-sql-base", dtype="float32").generate([PROMPTS[2]], GREEDY)).token_ids
    assert format != "f16" or ids[len(PROMPTS[2]) :] == list(ours)


def test_a_missing_package_is_named_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for module, to in (("gguf", "gguf"), ("ctranslate2", "ctranslate2")):
        monkeypatch.setitem(sys.modules, module, None)
        assert run(["export", str(tmp_path / "nothing"), "--to", to, "--out", str(tmp_path / "out")]) == 6
        assert f"{module} is not installed" in capsys.readouterr().err


def test_bad_options_are_one_line_each(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    (tmp_path / "there.gguf").write_bytes(b"x")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "onnx", "out": tmp_path / "a"}, "unknown format"),
        ({"to": "gguf", "out": tmp_path / "a", "format": "int8"}, "unknown --format for gguf; got int8"),
        ({"to": "gguf", "out": tmp_path}, "is a folder"),
        ({"to": "gguf", "out": tmp_path / "there.gguf"}, "is there already"),
        ({"to": "safetensors", "out": tmp_path}, "is not empty"),
    ]
    for options, problem in cases:
        with pytest.raises(ConfigError, match=problem):
            export(str(tiny), **options)
    with pytest.raises(CheckpointError):
        export(str(tmp_path / "nothing"), to="gguf", out=tmp_path / "a.gguf")


def test_a_converter_that_cannot_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2", reason="the extra ct2 is not installed")
    pytest.importorskip("transformers", reason="the converter needs transformers")
    monkeypatch.setattr("burnish.compress.ctranslate2_export._SCRIPT", "raise ValueError('no such model')")
    model = write_tiny_llama(tmp_path / "model")
    with pytest.raises(ConfigError, match="cannot convert this model; got ValueError: no such model"):
        export(str(model), to="ctranslate2", out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
