"""QLoRA from rows to a merged model, several adapters, and adapters on quantized bases at inference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline_fakes import logits_of, read_manifest_of

from burnish.compress.config import QuantizeConfig
from burnish.compress.frozen_linear import frozen_linears
from burnish.compress.int8_linear import Int8Linear
from burnish.engine.sampling import SamplingParams
from burnish.errors import ConfigError
from burnish.measure.compare import GateLimits
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.merge import merge
from burnish.pipeline.merge_choice import MergeTrial, better
from burnish.pipeline.opening import EngineOptions, Source, open_decoder, open_engine
from burnish.pipeline.quantize import quantize
from burnish.pipeline.tune import TuneRecord, tune
from burnish.plan.options import PlanOptions
from burnish.plan.predict import predict_stage
from burnish.train.config import TrainConfig
from burnish.train.dora import dense_weight
from burnish.train.freezing import BASE_FORMATS
from burnish.train.lora import LoraConfig, lora_modules

TOKENS = [[7, 300, 12, 2999, 41, 8, 500, 6]]
FLOAT32 = Source(dtype="float32")
FAST = TrainConfig(steps=12, micro_batch_size=4, learning_rate=5e-3, precision="float32")
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def tuned_as(
    tiny: Path, rows_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TuneRecord]:
    """Adapters by method and kind, each tuned once."""
    made: dict[tuple[str, bool], TuneRecord] = {}

    def make(method: str, *, dora: bool = False) -> TuneRecord:
        if (method, dora) not in made:
            made[method, dora] = tune(
                str(tiny),
                data=DataConfig(source=str(rows_file)),
                eval_data=str(held_out_file),
                out=tmp_path_factory.mktemp(method) / "adapter",
                lora=replace(LORA, use_dora=dora, rank_stabilized=dora),
                config=replace(FAST, method=method),
                source=FLOAT32,
            )
        return made[method, dora]

    return make


@pytest.mark.parametrize(("method", "kind"), [("qlora-4bit", "nf4"), ("qlora-8bit", "int8")])
def test_qlora_learns_and_its_adapter_says_how(
    tiny: Path, tuned: TuneRecord, tuned_as: Callable[..., TuneRecord], method: str, kind: str
) -> None:
    record = tuned_as(method)
    assert record.method == method
    assert record.steps[-1]["loss"] < record.steps[0]["loss"] - 0.5
    assert record.steps[-1]["loss"] == pytest.approx(tuned.steps[-1]["loss"], rel=0.1)
    assert record.component_bytes["weights"] < tuned.component_bytes["weights"]
    assert record.predicted_peak_bytes
    manifest = read_manifest_of(record.adapter)
    assert manifest["kind"] == "adapter"
    assert manifest["config"]["base_format"]["kind"] == kind
    peft = json.loads((Path(record.adapter) / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == str(tiny)
    assert not any("quant" in key for key in peft), "PEFT warns of keys that it does not know"


@pytest.mark.parametrize("dora", [False, True])
def test_both_bases_are_tried_and_the_better_one_is_kept(
    tuned_as: Callable[..., TuneRecord], tmp_path: Path, dora: bool
) -> None:
    adapter = tuned_as("qlora-4bit", dora=dora).adapter
    record = merge(adapter, out=tmp_path / "auto")
    assert [trial.onto for trial in record.trials] == ["original", "dequantized"]
    original, dequantized = record.trials
    assert dequantized.kl_mean < 1e-6 < original.kl_mean, "merging onto what it was trained on changes nothing"
    assert dequantized.loss == pytest.approx(dequantized.loss_unmerged, abs=1e-5)
    best = min(record.trials, key=lambda trial: trial.loss)
    assert record.onto == best.onto or abs(original.loss - dequantized.loss) < 1e-3
    assert f"on the {record.onto} weights" in record.reason
    assert record.gate.verdict == "pass"
    assert record.gate.kl_mean < 1e-6
    manifest = read_manifest_of(record.out)
    assert manifest["config"]["onto"] == record.onto
    assert manifest["figures"]["reason"] == record.reason


@pytest.mark.parametrize(("onto", "frozen"), [("original", False), ("dequantized", True)])
def test_merged_onto_equals_unmerged_there(
    tuned_as: Callable[..., TuneRecord], tmp_path: Path, onto: str, frozen: bool
) -> None:
    adapter = tuned_as("qlora-8bit").adapter
    record = merge(adapter, out=tmp_path / onto, onto=onto)
    assert (record.onto, record.reason, record.trials) == (onto, "as asked", [])
    parent = open_decoder(adapter, FLOAT32, frozen=BASE_FORMATS["qlora-8bit"] if frozen else None)
    child = open_decoder(record.out, FLOAT32)
    torch.testing.assert_close(
        logits_of(child.decoder, TOKENS), logits_of(parent.decoder, TOKENS), atol=1e-4, rtol=1e-4
    )


def test_choice_takes_the_lower_loss_and_then_the_nearer() -> None:
    def trial(onto: str, loss: float, kl: float) -> MergeTrial:
        return MergeTrial(onto=onto, loss=loss, loss_unmerged=2.0, kl_mean=kl, greedy_agreement=1.0)

    onto, reason = better([trial("original", 1.9, 0.02), trial("dequantized", 2.0, 0.0)])
    assert onto == "original"
    assert reason.startswith("lower held-out loss: 1.9000 nats per token on the original weights, 2.0000 on the deq")
    onto, reason = better([trial("original", 2.0, 0.02), trial("dequantized", 2.0004, 0.0)])
    assert onto == "dequantized"
    assert "closer to the unmerged adapter" in reason
    assert better([trial("original", float("nan"), float("nan")), trial("dequantized", 9.0, 0.1)])[0] == "dequantized"


def test_plain_adapter_goes_onto_the_original_weights_only(tuned: TuneRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say that its base was quantized"):
        merge(tuned.adapter, out=tmp_path / "out", onto="dequantized")
    with pytest.raises(ConfigError, match="onto is not known"):
        merge(tuned.adapter, out=tmp_path / "out", onto="both")
    assert not (tmp_path / "out").exists()


def test_several_adapters_merge_by_weight(
    tuned: TuneRecord, tuned_as: Callable[..., TuneRecord], tmp_path: Path
) -> None:
    dora = tuned_as("lora", dora=True)
    record = merge([tuned.adapter, dora.adapter], weights=[0.7, 0.3], out=tmp_path / "both")
    assert record.gate.verdict == "pass"
    assert record.gate.kl_mean < 1e-6
    assert record.weights == [0.7, 0.3]
    assert record.adapter == f"{tuned.adapter} + {dora.adapter}"
    assert set(read_manifest_of(record.out)["inputs"]) == {"base", "adapter 1", "adapter 2"}
    child = open_decoder(record.out, FLOAT32).decoder
    base = open_decoder(tuned.base, FLOAT32).decoder
    expected = base.get_submodule("model.layers.0.self_attn.q_proj").weight.clone()
    for opened, weight in ((tuned, 0.7), (dora, 0.3)):
        layer = lora_modules(open_decoder(opened.adapter, FLOAT32).decoder)["model.layers.0.self_attn.q_proj"]
        expected += weight * (layer.merged_weight() - layer.base.weight)
    torch.testing.assert_close(child.get_submodule("model.layers.0.self_attn.q_proj").weight, expected)


def test_several_adapters_need_weights_and_one_base(
    tuned: TuneRecord, tuned_as: Callable[..., TuneRecord], tmp_path: Path
) -> None:
    pair = [tuned.adapter, tuned_as("qlora-4bit").adapter]
    with pytest.raises(ConfigError, match="several adapters need weights"):
        merge(pair, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="differ in number"):
        merge(pair, weights=[1.0], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"differently quantized bases.*none, nf4"):
        merge(pair, weights=[0.5, 0.5], out=tmp_path / "out")
    merge(pair, weights=[0.5, 0.5], onto="original", out=tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tuned.adapter).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    record = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**record, "base_model_name_or_path": "org/another"}))
    with pytest.raises(ConfigError, match="name different bases"):
        merge([tuned.adapter, str(other)], weights=[0.5, 0.5], out=tmp_path / "more")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "gptq"])
def test_adapter_runs_unmerged_on_a_quantized_base(
    tiny: Path, tuned_as: Callable[..., TuneRecord], tmp_path: Path, kind: str, dora: bool
) -> None:
    adapter = tuned_as("lora", dora=dora).adapter
    model, options = str(tiny), EngineOptions(quantize=kind if kind != "gptq" else "none", weights_cache=False)
    if kind == "gptq":
        config = QuantizeConfig(method="rtn", bits=4, group_size=16)
        model = quantize(str(tiny), out=tmp_path / "gptq", config=config, limits=GateLimits()).out
    engine = open_engine(model, FLOAT32, adapter=adapter, options=options)
    answers = list(engine.generate(TOKENS, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
    # The reference: the same rounded weights as dense ones, with the same adapter.
    opened = open_decoder(model, FLOAT32, adapter=adapter, quantize=options.quantize, weights_cache=False)
    quantized = logits_of(opened.decoder, TOKENS)
    tokens = list(TOKENS[0])
    for _ in range(8):
        tokens.append(int(logits_of(opened.decoder, [tokens])[0, -1].argmax()))
    assert list(answers[0].token_ids) == tokens[len(TOKENS[0]) :]
    rounds_inputs = any(isinstance(layer.base, Int8Linear) for layer in lora_modules(opened.decoder).values())
    for layer in lora_modules(opened.decoder).values():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = torch.nn.Parameter(dense_weight(layer.base).float(), requires_grad=False)
        layer.base = dense
    expected = logits_of(opened.decoder, TOKENS)
    scale = float(expected.abs().max())
    assert (quantized - expected).abs().max() < (0.05 if rounds_inputs else 1e-4) * scale
    plain = open_decoder(model, FLOAT32, quantize=options.quantize, weights_cache=False)
    assert (logits_of(plain.decoder, TOKENS) - quantized).abs().max() > 0.1, "the test would prove nothing"


@pytest.mark.parametrize("method", ["qlora-4bit", "qlora-8bit"])
def test_frozen_base_holds_what_plan_predicts_and_nothing_dense(tiny: Path, method: str) -> None:
    decoder = open_decoder(str(tiny), FLOAT32, frozen=BASE_FORMATS[method]).decoder
    assert len(frozen_linears(decoder)) == 14
    assert sum(parameter.dim() == 2 for parameter in decoder.parameters()) <= 2
    predicted = predict_stage(decoder.config, method, device="cpu", options=PlanOptions(dtype="float32"))
    held = sum(tensor.nbytes for tensor in decoder.state_dict().values())
    assert predicted.components["weights"] == pytest.approx(held, rel=1e-3)


def test_full_tuning_with_frozen_parts_writes_them_back_untouched(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(method="full", freeze=("model.layers.1.*",), steps=2, learning_rate=1e-3, precision="float32")
    record = tune(
        str(tiny), data=DataConfig(source=str(rows_file)), out=tmp_path / "full", config=config, source=FLOAT32
    )
    before, after = (open_decoder(path, FLOAT32).decoder.state_dict() for path in (str(tiny), record.adapter))
    frozen = {name for name in before if name.startswith("model.layers.1.")}
    assert all(torch.equal(before[name], after[name]) == (name in frozen) for name in before)
    total = sum(tensor.numel() for tensor in before.values())
    assert record.trained_parameters == total - sum(before[name].numel() for name in frozen)
    assert read_manifest_of(record.adapter)["config"]["train"]["freeze"] == ["model.layers.1.*"]


def test_lora_config_of_the_record_is_kept(tuned_as: Callable[..., TuneRecord]) -> None:
    manifest = read_manifest_of(tuned_as("qlora-4bit", dora=True).adapter)
    assert manifest["config"]["lora"] == {
        **manifest["config"]["lora"],
        "use_dora": True,
        "rank_stabilized": True,
        "rank": LoraConfig(rank=4).rank,
    }
