from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from pipeline_fakes import logits_of, read_manifest_of, spoil

import burnish.pipeline.merge as merge_module
from burnish.errors import ConfigError, GateError
from burnish.models.decoder import Decoder
from burnish.pipeline.merge import MergeRecord, merge
from burnish.pipeline.opening import Source, open_decoder
from burnish.pipeline.tune import TuneRecord
from burnish.train.lora import merge_adapter

TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]


def test_merged_model_is_the_adapter(tuned: TuneRecord, merged: MergeRecord) -> None:
    assert merged.gate.verdict == "pass"
    assert merged.gate.kl_mean < 1e-6
    assert merged.gate.greedy_agreement == 1.0
    assert merged.gate.num_tokens > 0
    assert merged.merged_linears == 14
    assert merged.disk_bytes >= (Path(merged.out) / "model.safetensors").stat().st_size
    adapter = open_decoder(tuned.adapter, Source(dtype="float32"))
    child = open_decoder(merged.out, Source(dtype="float32"))
    torch.testing.assert_close(
        logits_of(child.decoder, TOKENS), logits_of(adapter.decoder, TOKENS), atol=1e-4, rtol=1e-4
    )


def test_merged_folder_loads_in_transformers_with_its_tokenizer(tiny: Path, merged: MergeRecord) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged.out, dtype=torch.float32).eval()
    ours = open_decoder(merged.out, Source(dtype="float32"))
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits_of(ours.decoder, TOKENS), expected, atol=1e-4, rtol=1e-4)
    assert (Path(merged.out) / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_manifest_names_base_and_adapter(tiny: Path, tuned: TuneRecord, merged: MergeRecord) -> None:
    record = read_manifest_of(merged.out)
    assert record["kind"] == "merged"
    assert record["inputs"]["base"]["path"] == str(tiny)
    assert record["inputs"]["adapter"]["path"] == tuned.adapter
    assert record["inputs"]["base"]["fingerprint"] != record["inputs"]["adapter"]["fingerprint"]
    assert record["inputs"]["base"] == read_manifest_of(tuned.adapter)["inputs"]["base"]
    assert record["gate"]["verdict"] == "pass"
    assert record["data"] == read_manifest_of(tuned.adapter)["data"]


def test_corrupt_merge_fails_its_gate_and_stays_on_disk(
    tuned: TuneRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_merge(decoder: Decoder) -> list[str]:
        names = merge_adapter(decoder)
        spoil(decoder, scale=0.05)
        return names

    monkeypatch.setattr(merge_module, "merge_adapter", wrong_merge)
    with pytest.raises(GateError, match="worse than its parent") as caught:
        merge(tuned.adapter, out=tmp_path / "out")
    assert caught.value.exit_code == 4
    record = read_manifest_of(tmp_path / "out")
    assert record["gate"]["verdict"] == "fail"
    assert record["gate"]["reasons"]
    open_decoder(str(tmp_path / "out"), Source())


def test_merge_keeps_the_dtype_asked_for(tuned: TuneRecord, tmp_path: Path) -> None:
    record = merge(tuned.adapter, out=tmp_path / "half", dtype="bfloat16", limits=merge_module.GateLimits())
    assert record.dtype == "bfloat16"
    assert open_decoder(record.out, Source()).decoder.config.num_parameters() > 0
    assert transformers.AutoConfig.from_pretrained(record.out).dtype == torch.bfloat16


def test_merging_a_plain_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a model already, not an adapter"):
        merge(str(tiny), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
