"""Predictions, whether they fit, and what is advised."""

from __future__ import annotations

import json

import pytest

from burnish.errors import CapacityError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES
from burnish.plan.devices import DEVICES, Device
from burnish.plan.options import PlanOptions
from burnish.plan.predict import plan, predict_stage, require_fit
from burnish.plan.stages import STAGES, load_dtype
from burnish.plan.weights import block_linears

GIB = 2**30
# The published runs: float32, eight rows of up to 256 tokens, one A100 with 40 GB.
PUBLISHED = PlanOptions(dtype="float32", precision="float32", micro_batch_size=8, sequence_tokens=256)


def shape(name: str) -> ModelConfig:
    return config_of(SHAPES[name])


def laptop(*, bfloat16: bool = False, memory_gib: int = 16) -> Device:
    return Device(
        name="cpu",
        title="a laptop",
        kind="cpu",
        memory_bytes=memory_gib * GIB,
        bandwidth=40e9,
        fp32=4e11,
        fp16=None,
        bf16=8e11 if bfloat16 else None,
        int8=None,
        bfloat16=bfloat16,
        source="made for the test",
    )


def test_published_fine_tunes_fit_or_fail_as_they_did() -> None:
    fits = {
        (name, stage): predict_stage(shape(name), stage, device="a100-40g", options=PUBLISHED).fits
        for name in ("bloom-1b1", "bloom-7b1", "falcon-7b")
        for stage in ("load", "lora", "qlora-4bit", "qlora-8bit")
    }
    assert not fits["bloom-7b1", "lora"]
    assert not fits["falcon-7b", "lora"]
    assert all(fit for (name, stage), fit in fits.items() if name == "bloom-1b1" or stage != "lora")


@pytest.mark.parametrize(
    ("name", "published_gb"), [("bloom-1b1", 4.5), ("bloom-7b1", 27), ("falcon-7b", 28), ("codegen2-1b", 4.5)]
)
def test_loading_in_float32_is_near_the_published_memory(name: str, published_gb: float) -> None:
    peak = predict_stage(shape(name), "load", device="a100-40g", options=PUBLISHED).peak_bytes
    assert peak / GIB == pytest.approx(published_gb, rel=0.08)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["t4", "h200"])
def test_peak_is_the_sum_of_positive_components(stage: str, device: str) -> None:
    prediction = predict_stage(shape("tinyllama-1.1b"), stage, device=device)
    assert prediction.peak_bytes == sum(prediction.components.values())
    assert all(size > 0 for size in prediction.components.values())
    assert prediction.growth_bytes == prediction.peak_bytes - prediction.components["runtime"]


def test_stages_of_the_machine_can_be_planned() -> None:
    result = plan(shape("135m"), device="cpu", stages=("load", "inference"))
    assert result.device.kind == "cpu"
    assert result.stage("load").peak_bytes < result.stage("inference").peak_bytes


def test_inference_grows_with_concurrency_and_without_cache_shrinks() -> None:
    config = shape("mistral-7b")
    sizes = [
        predict_stage(config, "inference", device="a100-80g", options=PlanOptions(concurrency=count)).components["kv"]
        for count in (8, 9, 16)
    ]
    assert sizes[1] * 8 == sizes[0] * 9
    assert sizes[2] == 2 * sizes[0]
    bare = predict_stage(config, "inference", device="a100-80g", options=PlanOptions(kv_cache=False))
    assert "kv" not in bare.components


def test_a_cpu_holds_a_tied_output_layer_beside_the_embeddings() -> None:
    config = shape("135m")
    assert config.tie_word_embeddings
    parts = predict_stage(
        config, "inference", device=laptop(bfloat16=True), options=PlanOptions(dtype="bfloat16")
    ).components
    assert parts["output layer"] == 2 * config.vocab_size * config.hidden_size
    assert "output layer" not in predict_stage(shape("tinyllama-1.1b"), "inference", device=laptop()).components
    assert "output layer" not in predict_stage(config, "inference", device="t4").components


def test_full_training_holds_sixteen_bytes_per_parameter_before_activations() -> None:
    config = shape("135m")
    parts = predict_stage(config, "full", device=laptop()).components
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * config.num_parameters()
    body = sum(rows * columns for rows, columns in block_linears(config))
    assert parts["cast weights"] == 4 * body  # the blocks' linears stand joined beside the trained ones
    cast = predict_stage(config, "full", device=laptop(bfloat16=True)).components
    assert cast["cast weights"] == 2 * body
    assert cast["activations"] < parts["activations"]


def test_checkpointing_and_smaller_batches_save_activations() -> None:
    config = shape("135m")
    peaks = [
        predict_stage(config, "lora", device=laptop(), options=options).peak_bytes
        for options in (
            PlanOptions(sequence_tokens=256),
            PlanOptions(sequence_tokens=256, micro_batch_tokens=256),
            PlanOptions(sequence_tokens=256, micro_batch_tokens=256, gradient_checkpointing=True, checkpoint_every=2),
            PlanOptions(sequence_tokens=256, micro_batch_tokens=256, gradient_checkpointing=True),
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[3] < 0.75 * peaks[0]


@pytest.mark.parametrize(
    ("name", "stored", "bfloat16", "expected"),
    [
        ("135m", "bfloat16", False, "float32"),
        ("135m", "float32", True, "bfloat16"),
        ("tinyllama-1.1b", "bfloat16", False, "bfloat16"),
        ("tinyllama-1.1b", "float32", False, "float32"),
    ],
)
def test_auto_dtype_on_a_processor_follows_size_and_hardware(
    name: str, stored: str, bfloat16: bool, expected: str
) -> None:
    assert load_dtype(shape(name), laptop(bfloat16=bfloat16), PlanOptions(), stored) == expected


def test_auto_dtype_on_a_card_without_bfloat16_is_float16() -> None:
    assert load_dtype(shape("mistral-7b"), DEVICES["t4"], PlanOptions(), "bfloat16") == "float16"
    assert load_dtype(shape("mistral-7b"), DEVICES["l4"], PlanOptions(), "bfloat16") == "bfloat16"


def test_capacity_error_names_stage_device_and_remedy() -> None:
    prediction = predict_stage(shape("bloom-7b1"), "lora", device="a100-40g", options=PUBLISHED)
    with pytest.raises(CapacityError) as caught:
        require_fit(prediction, DEVICES["a100-40g"])
    assert caught.value.exit_code == 3
    for part in ("lora", "a100-40g", "weights 26.3 GiB", "--gradient-checkpointing"):
        assert part in caught.value.message
    assert "\n" not in caught.value.message


def test_what_fits_is_let_through_without_a_remedy() -> None:
    prediction = predict_stage(shape("135m"), "inference", device="t4")
    assert prediction.fits
    assert prediction.remedy is None
    require_fit(prediction, DEVICES["t4"])


def test_remedy_is_a_larger_device_when_no_option_helps() -> None:
    prediction = predict_stage(shape("mistral-7b"), "merge", device="t4")
    assert not prediction.fits
    assert prediction.remedy == "Use a device with more memory, such as h100-80g."


def test_remedy_of_a_model_too_large_for_any_device_says_so() -> None:
    huge = ModelConfig.from_dict({**shape("mistral-7b").to_dict(), "num_layers": 3200})
    remedy = predict_stage(huge, "load", device="h200").remedy
    assert remedy is not None
    assert "smaller model" in remedy


@pytest.mark.parametrize("stage", ["inference", "lora", "full", "quantize", "load"])
def test_remedy_that_is_advised_fits(stage: str) -> None:
    # 4 GiB hold the weights of a model of a billion parameters in 16 bits, and little work.
    prediction = predict_stage(
        shape("tinyllama-1.1b"), stage, device=laptop(memory_gib=4), options=PlanOptions(dtype="float32")
    )
    assert not prediction.fits
    assert prediction.remedy is not None
    if prediction.remedy.startswith("Use --"):
        advised = float(prediction.remedy.rsplit(": ", 1)[1].removesuffix(" GiB."))
        assert advised <= 4 * 0.9


def test_plan_is_json_with_every_promised_part() -> None:
    record = json.loads(json.dumps(plan(shape("mistral-7b"), model="mistral-7b", device="t4").to_dict()))
    assert record["parameters"] == 7241732096
    assert record["kv_bytes_per_token"] == 131072
    assert record["weight_bytes"]["float32"] == 4 * record["parameters"]
    assert record["weight_bytes"]["bfloat16"] == 2 * record["parameters"]
    assert (
        record["weight_bytes"]["nf4"]
        < record["weight_bytes"]["int4"]
        < record["weight_bytes"]["int8"]
        < record["weight_bytes"]["float16"]
    )
    assert [stage["name"] for stage in record["stages"]] == list(STAGES)
    assert not record["fits"]


def test_unknown_stage_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown stage"):
        predict_stage(shape("135m"), "distil", device="t4")
    with pytest.raises(ConfigError, match="concurrency"):
        PlanOptions(concurrency=0)
    with pytest.raises(ConfigError, match="weight_format"):
        PlanOptions(weight_format="int3")
    with pytest.raises(ConfigError, match="group_size"):
        PlanOptions(group_size=0)
