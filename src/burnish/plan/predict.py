"""The plan: what a model weighs, what each stage will need on a device, whether that fits, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from burnish.errors import CapacityError
from burnish.models.config import ModelConfig
from burnish.plan.devices import Device, find_device, smallest_that_holds
from burnish.plan.options import PlanOptions
from burnish.plan.sharding import Split, predict_splits
from burnish.plan.stages import STAGES, load_dtype, predict_components
from burnish.plan.timing import GenerationTime, generation_time, quantization_seconds, training_seconds
from burnish.plan.weights import FORMATS, weight_bytes

TRAINING = ("lora", "qlora-8bit", "qlora-4bit", "full")


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """What one stage will need.

    Attributes:
        name: the stage.
        peak_bytes: the sum of the components.
        components: bytes by what holds them.
        seconds: estimate; None where rates or the amount of work are unknown.
        fits: whether the device's usable memory holds the peak.
        remedy: what would make it fit; None when it fits.
    """

    name: str
    peak_bytes: int
    components: dict[str, int]
    seconds: float | None
    fits: bool
    remedy: str | None

    @property
    def growth_bytes(self) -> int:
        """What the stage adds to a process that has its libraries imported: the peak without the runtime."""
        return self.peak_bytes - self.components.get("runtime", 0)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values, growth included."""
        return {**asdict(self), "growth_bytes": self.growth_bytes}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on a device.

    Attributes:
        model: its name, for people.
        device: where it is to run.
        dtype: what it would be loaded in.
        parameters: numbers stored; tied weights count once.
        weight_bytes: all weights, by format.
        kv_bytes_per_token: keys and values of one token, in `dtype`.
        options: the work assumed.
        stages: in the order they were asked for.
        generation: times of the inference stage; None where unknown.
        splits: ways of dividing the model over several devices; empty for one.
    """

    model: str
    device: Device
    dtype: str
    parameters: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: int
    options: PlanOptions
    stages: tuple[StagePrediction, ...]
    generation: GenerationTime | None
    splits: tuple[Split, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits for stage in self.stages)

    def stage(self, name: str) -> StagePrediction:
        """The prediction of one stage; KeyError where it was not asked for."""
        return {stage.name: stage for stage in self.stages}[name]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "model": self.model,
            "device": {**self.device.to_dict(), "usable_bytes": self.device.usable_bytes},
            "dtype": self.dtype,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "options": self.options.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "generation": None if self.generation is None else asdict(self.generation),
            "fits": self.fits,
            "splits": [split.to_dict() for split in self.splits],
        }


def plan(
    config: ModelConfig,
    *,
    model: str = "model",
    device: Device | str = "cpu",
    options: PlanOptions | None = None,
    stored_dtype: str | None = None,
    stages: Sequence[str] = tuple(STAGES),
    cards: int = 1,
) -> Plan:
    """Predict what a model needs on a device, stage by stage. Runs in milliseconds and reads no weights.

    Args:
        config: the model's shape.
        model: its name, for the record.
        device: a `Device`, or a name that `find_device` knows; "cpu" is this machine.
        options: the work; lengths and batches by default as the commands have them.
        stored_dtype: dtype of the checkpoint, where known.
        stages: names of `STAGES`.
        cards: devices of this kind that share the model; the stages are of one.

    Raises:
        ConfigError: an unknown device or stage.
    """
    place = find_device(device) if isinstance(device, str) else device
    work = options or PlanOptions()
    dtype = load_dtype(config, place, work, stored_dtype)
    sizes = {name: weight_bytes(config, name, group_size=work.group_size).total for name in FORMATS}
    return Plan(
        model=model,
        device=place,
        dtype=dtype,
        parameters=config.num_parameters(),
        weight_bytes=sizes,
        kv_bytes_per_token=config.kv_bytes_per_token(4 if dtype == "float32" else 2),
        options=work,
        stages=tuple(
            predict_stage(config, name, device=place, options=work, stored_dtype=stored_dtype) for name in stages
        ),
        generation=_generation(config, place, work, dtype),
        splits=()
        if cards == 1
        else predict_splits(config, cards=cards, device=place, options=work, stored_dtype=stored_dtype),
    )


def predict_stage(
    config: ModelConfig,
    stage: str,
    *,
    device: Device | str = "cpu",
    options: PlanOptions | None = None,
    stored_dtype: str | None = None,
) -> StagePrediction:
    """Predict one stage; arguments and errors as in `plan`."""
    place = find_device(device) if isinstance(device, str) else device
    work = options or PlanOptions()
    parts = predict_components(stage, config, place, work, stored_dtype=stored_dtype)
    peak = sum(parts.values())
    fits = peak <= place.usable_bytes
    dtype = load_dtype(config, place, work, stored_dtype)
    return StagePrediction(
        name=stage,
        peak_bytes=peak,
        components=parts,
        seconds=_seconds(config, stage, place, work, dtype),
        fits=fits,
        remedy=None if fits else _remedy(config, stage, place, work, stored_dtype),
    )


def require_fit(prediction: StagePrediction, device: Device) -> None:
    """Refuse a stage that will not fit.

    Raises:
        CapacityError: with the peak, the device's memory and the remedy (exit code 3).
    """
    if prediction.fits:
        return
    largest = sorted(prediction.components.items(), key=lambda item: -item[1])[:3]
    raise CapacityError(
        f"{prediction.name} will not fit on {device.name}: it needs {_gib(prediction.peak_bytes)} "
        f"({', '.join(f'{name} {_gib(size)}' for name, size in largest)})",
        expected=f"at most {_gib(device.usable_bytes)}",
        remedy=prediction.remedy,
    )


def _generation(config: ModelConfig, device: Device, options: PlanOptions, dtype: str) -> GenerationTime | None:
    weights = weight_bytes(config, options.weight_format or dtype, group_size=options.group_size).total
    return generation_time(config, device, options, dtype=dtype, weights=weights)


def _seconds(config: ModelConfig, stage: str, device: Device, options: PlanOptions, dtype: str) -> float | None:
    if stage == "inference":
        times = _generation(config, device, options, dtype)
        return None if times is None else times.seconds
    if stage == "quantize":
        return quantization_seconds(config, device, options)
    if stage in TRAINING:
        computing = "bfloat16" if options.precision == "bfloat16" else "float32"
        if options.precision == "auto" and device.bfloat16:
            computing = "bfloat16"
        return training_seconds(config, device, options, dtype=computing, full=stage == "full")
    return None


def _remedy(config: ModelConfig, stage: str, device: Device, options: PlanOptions, stored_dtype: str | None) -> str:
    """The mildest change that fits, else the smallest GPU that would."""
    for advice, other_stage, changed in _alternatives(stage, options, device):
        parts = predict_components(other_stage, config, device, changed, stored_dtype=stored_dtype)
        if sum(parts.values()) <= device.usable_bytes:
            return f"Use {advice}: {_gib(sum(parts.values()))}."
    needed = sum(predict_components(stage, config, device, options, stored_dtype=stored_dtype).values())
    larger = smallest_that_holds(needed)
    if larger is None or larger.memory_bytes <= device.memory_bytes:
        return "No single device of the catalogue holds it; use a smaller model."
    return f"Use a device with more memory, such as {larger.name}."


def _alternatives(stage: str, options: PlanOptions, device: Device) -> Iterator[tuple[str, str, PlanOptions]]:
    """(advice, stage, options) from the mildest change to the hardest; only what burnish's commands can do."""
    half = "bfloat16" if device.bfloat16 or device.kind == "cpu" else "float16"
    if stage in TRAINING:
        saving = replace(options, gradient_checkpointing=True)
        smallest = replace(saving, micro_batch_size=1)
        flags = "--gradient-checkpointing --micro-batch-size 1"
        yield "--gradient-checkpointing", stage, saving
        yield flags, stage, smallest
        if stage == "full":
            yield f"--method lora {flags}", "lora", smallest
        if stage in ("full", "lora"):
            yield f"--method lora --dtype {half} {flags}", "lora", replace(smallest, dtype=half)
            yield f"an adapter on the model quantized to 8 bits, with {flags}", "qlora-8bit", smallest
    elif stage == "inference":
        yield f"--dtype {half}", stage, replace(options, dtype=half)
        packed = replace(options, dtype=half, weight_format="int8")
        yield "the model quantized to 8 bits", stage, packed
        for concurrency in (8, 1):
            if concurrency < options.concurrency:
                fewer = replace(packed, concurrency=concurrency)
                yield f"the model quantized to 8 bits and --concurrency {concurrency}", stage, fewer
    elif stage == "quantize":
        fewer = replace(options, calibration_tokens=max(1, options.calibration_tokens // 4))
        yield "a quarter of the --samples", stage, fewer
        yield f"a quarter of the --samples and --dtype {half}", stage, replace(fewer, dtype=half)
    elif stage == "load":
        yield f"--dtype {half}", stage, replace(options, dtype=half)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
