from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipeline_fakes import logits_of

import burnish
from burnish.errors import CheckpointError, ConfigError
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.opening import EngineOptions, Source, check_output, open_decoder, open_engine
from burnish.pipeline.tune import TuneRecord
from tiny_llama import write_tiny_llama

TOKENS = [[7, 300, 12, 2999]]


def test_adapter_folder_stands_for_base_and_adapter(tiny: Path, tuned: TuneRecord) -> None:
    alone = open_decoder(tuned.adapter, Source(dtype="float32"))
    named = open_decoder(str(tiny), Source(dtype="float32"), adapter=tuned.adapter)
    assert alone.adapter == named.adapter == Path(tuned.adapter)
    assert torch.equal(logits_of(alone.decoder, TOKENS), logits_of(named.decoder, TOKENS))


def test_base_given_takes_the_place_of_the_recorded_one(tiny: Path, tuned: TuneRecord, tmp_path: Path) -> None:
    moved = write_tiny_llama(tmp_path / "moved")
    assert open_decoder(tuned.adapter, Source(), base=str(moved)).name == str(moved)
    with pytest.raises(ConfigError, match="no adapter"):
        open_decoder(str(tiny), Source(), base=str(moved))


def test_adapter_without_a_base_asks_for_one(tuned: TuneRecord, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = json.loads((Path(tuned.adapter) / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not name its base"):
        open_decoder(str(folder), Source())


def test_model_without_a_tokenizer_says_which_files_it_looked_for(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(tiny / name)
    with pytest.raises(CheckpointError, match=r"no tokenizer.*tokenizer\.json"):
        open_decoder(str(folder), Source())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown device"),
        ({"device": "mps"}, "unknown device"),
        ({"dtype": "float12"}, "dtype"),
        ({"threads": 0}, "threads"),
    ],
)
def test_source_refuses_what_it_cannot_honour(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Source(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_card_says_to_use_the_cpu() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        Source(device="cuda")


def test_adapters_run_on_the_native_engine_only(tuned: TuneRecord) -> None:
    with pytest.raises(ConfigError, match="burnish merge"):
        open_engine(tuned.adapter, Source(), engine="transformers")


def test_output_is_refused_where_nothing_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="not empty"):
        check_output(tmp_path, overwrite=False)
    assert check_output(tmp_path, overwrite=True) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_python_face_loads_and_generates(merged: MergeRecord, tuned: TuneRecord) -> None:
    model, tokenizer = burnish.load(merged.out, dtype="float32")
    assert logits_of(model, [tokenizer.encode("SELECT name")]).shape[-1] == model.config.vocab_size
    params = burnish.SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = ["SELECT", tokenizer.encode("ship"), [{"role": "user", "content": "How many?"}]]
    outputs = list(burnish.Engine(merged.out, dtype="float32").generate(prompts, params))
    assert [len(output.token_ids) for output in outputs] == [6, 6, 6]
    unmerged = list(burnish.Engine(tuned.adapter, dtype="float32").generate(prompts, params))
    assert [output.text for output in unmerged] == [output.text for output in outputs]
    engine = burnish.Engine(merged.out, dtype="float32")
    assert engine.warm_up() > 0
    assert "".join(event.text for event in engine.stream("SELECT", params)) == outputs[0].text


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_python_engine_quantizes_and_stays_within_memory(tiny: Path, quantize: str) -> None:
    engine = burnish.Engine(str(tiny), dtype="float32", quantize=quantize, kv_memory="4MiB", max_model_len=64)
    (output,) = engine.generate([[5, 6, 7]], burnish.SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.token_ids) == 4
    assert 0 < engine.stats().kv_bytes <= 4 * 2**20
    dense = burnish.Engine(str(tiny), dtype="float32", max_model_len=64)
    assert engine.stats().weights_bytes < dense.stats().weights_bytes


def test_unknown_quantization_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="int3"):
        EngineOptions(quantize="int3")


def test_adapters_run_on_a_quantized_base(tiny: Path, tuned: TuneRecord) -> None:
    options = EngineOptions(quantize="int8")
    engine = open_engine(str(tiny), Source(dtype="float32"), adapter=tuned.adapter, options=options)
    (quantized,) = engine.generate(TOKENS, burnish.SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(quantized.token_ids) == 4
    opened = open_decoder(str(tiny), Source(dtype="float32"), adapter=tuned.adapter, quantize="int8")
    dense = open_decoder(str(tiny), Source(dtype="float32"), adapter=tuned.adapter)
    difference = logits_of(opened.decoder, TOKENS) - logits_of(dense.decoder, TOKENS)
    assert 0 < difference.norm() < 0.1 * logits_of(dense.decoder, TOKENS).norm()
