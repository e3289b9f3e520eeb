"""`tune --memory` and `--dry-run`: settings that fit into a budget, predicted before the model is loaded, tried after.

What is counted: on a CPU the peak resident set of the whole process, Python and its libraries included; on CUDA the
most that the allocator has handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

from burnish.measure.formatting import format_bytes, format_rate
from burnish.measure.memory import MemoryMeter, release_free_memory, resident_bytes
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.pipeline.opening import Source
from burnish.pipeline.predicted import batches_of, training_options
from burnish.plan import overheads
from burnish.plan.devices import Device, find_device
from burnish.plan.stages import predict_components
from burnish.train.batches import TrainingExample
from burnish.train.checkpoints import Checkpoint
from burnish.train.config import TrainConfig
from burnish.train.fitting import Rows, Setting, choose, cost, settings
from burnish.train.lora import LoraConfig
from burnish.train.probe import ProbeResult, probe

CHOSEN = ("precision", "micro_batch_size", "micro_batch_tokens", "gradient_accumulation", "gradient_checkpointing",
          "checkpoint_every")  # fmt: skip
MOST_TRIES = 3
LESS_MEMORY, SMALL_RANKS = ("lora", "qlora-4bit"), (8, 4)  # what else is looked at where nothing fits
BUDGET_STEP = 16 << 20  # budgets that are advised are round, and hold what differs from start to start
_WEIGHTS = ("weights", "cast weights", "adapter", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was chosen for a budget, as the record has it.

    Attributes:
        budget_bytes: given.
        setting: what was chosen, in words.
        dtype: that the base is held in.
        start_bytes: that the process held before the model was loaded, which count against the budget (on CUDA, 0).
        predicted_peak_bytes: over the start, as in `TuneRecord`.
        correction_bytes: what trials took beyond the prediction; the choice counts it.
        spare_bytes: kept free for what a prediction cannot know.
        components: the prediction, part by part.
        tried, fitting: settings looked at, and those that fit.
        measured_peak_bytes, tokens_per_s: of the probe, over the start; None until it ran.
        reason: one line.
    """

    budget_bytes: int
    setting: str
    dtype: str
    start_bytes: int
    predicted_peak_bytes: int
    correction_bytes: int
    spare_bytes: int
    components: dict[str, int]
    tried: int
    fitting: int
    measured_peak_bytes: int | None = None
    tokens_per_s: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Fitting:
    """Choosing for one run, before its model is loaded.

    Args:
        shape: of the model.
        rows: of the run.
        config, lora: its settings; what they name themselves is kept.
        source: its device and dtype; "auto" lets the base follow the precision: the same losses, for less memory.
    """

    def __init__(self, shape: ModelConfig, rows: Rows, config: TrainConfig, lora: LoraConfig, source: Source) -> None:
        self.shape, self.rows, self.config, self.lora = shape, rows, config, lora
        self.dtype = None if source.dtype == "auto" else source.dtype
        self.place: Device = find_device(source.device)
        self.budget = 0
        self.kind = self.place.kind
        self.correction = 0
        release_free_memory()
        self.start_bytes = resident_bytes() if self.kind == "cpu" else 0

    def dtype_for(self, precision: str) -> str:
        """What the base is loaded in."""
        if self.dtype is not None:
            return self.dtype
        return "bfloat16" if precision == "bfloat16" and self.config.method != "full" else "float32"

    def components(self, config: TrainConfig, *, rows: Sequence[int] | None = None) -> dict[str, int]:
        """Predicted bytes over the start, part by part.

        Args:
            rows: numbers of the only rows that run; None is all of the run.
        """
        options = training_options(
            config,
            self.lora,
            dtype=self.dtype_for(config.precision),
            longest=self.rows.longest,
            batches=batches_of(self.rows, config, device=self.kind, only=rows),
        )
        parts = predict_components(config.method, self.shape, self.place, options)
        return {name: size for name, size in parts.items() if name != "runtime"}

    def _taken(self, parts: dict[str, int]) -> int:
        """Bytes that a run with these parts takes of a budget, without what is kept spare."""
        return self.start_bytes + sum(parts.values()) + self.correction

    def choose(self, budget: int) -> tuple[TrainConfig, Fit]:
        """The run's settings with the fastest way that fits.

        Raises:
            CapacityError: nothing does.
        """
        config, self.budget = self.config, budget
        choice = choose(self.candidates(), budget=budget, peak=self.needs, time=self._time, remedy=self._remedy)
        chosen = choice.setting.applied(config)
        parts = self.components(chosen)
        spare = _spare(parts)
        return chosen, Fit(
            budget_bytes=budget,
            setting=str(choice.setting),
            dtype=self.dtype_for(chosen.precision),
            start_bytes=self.start_bytes,
            predicted_peak_bytes=sum(parts.values()),
            correction_bytes=self.correction,
            spare_bytes=spare,
            components=parts,
            tried=choice.tried,
            fitting=choice.fitting,
            reason=f"the fastest of {choice.fitting} settings out of {choice.tried} that fit",
        )

    def _remedy(self, least: Setting, needed: int) -> str:
        """The smallest budget as things are, and with what else takes less; each was worked out, none is a guess."""
        told = [f"As asked, {_budget(needed)} is the smallest budget ({least})"]
        smallest, flags = self._least_of_all()
        if _budget(smallest) != _budget(needed):
            told.append(f"with {' '.join(flags)} it is {_budget(smallest)}")
        else:
            told.append("no other method or rank takes less")
        line = "; ".join(told)
        if self.start_bytes:
            line += f"; Python and its libraries take {format_bytes(self.start_bytes)} of that"
        return f"{line}. Shorter rows (--max-length, now up to {self.rows.longest} tokens) take less too."

    def _least_of_all(self) -> tuple[int, list[str]]:
        """The smallest budget over methods and ranks, and the options that reach it."""
        found: list[tuple[int, list[str]]] = []
        methods = list(dict.fromkeys((self.config.method, *LESS_MEMORY)))
        ranks = list(dict.fromkeys((self.lora.rank, *(rank for rank in SMALL_RANKS if rank < self.lora.rank))))
        for method in methods:
            for rank in ranks:
                config = replace(self.config, method=method, freeze=())  # type: ignore[arg-type]
                other = copy(self)
                other.config, other.lora = config, replace(self.lora, rank=rank)
                flags = [f"--method {method}"] if method != self.config.method else []
                flags += [f"--rank {rank}"] if rank != self.lora.rank else []
                found.append((min(map(other.needs, other.candidates())), flags))
        return min(found, key=lambda each: (each[0], len(each[1])))

    def candidates(self) -> list[Setting]:
        """All settings that are looked at."""
        return settings(
            self.config,
            precisions=self._precisions(),
            device=self.kind,
            layers=self.shape.num_layers,
        )

    def needs(self, setting: Setting) -> int:
        """Bytes that a budget must have for a setting: its prediction and what is kept spare."""
        parts = self.components(setting.applied(self.config))
        return self._taken(parts) + _spare(parts)

    def _time(self, setting: Setting) -> float:
        batches = batches_of(self.rows, setting.applied(self.config), device=self.kind)
        return cost(setting, batches, full=self.config.method == "full", native=self.place.bfloat16)

    def _precisions(self) -> tuple[str, ...]:
        config = self.config
        if config.precision != "auto":
            return (config.precision,)
        if self.dtype == "bfloat16" or self.place.bfloat16:
            return ("bfloat16",)
        return ("float32", "bfloat16") if self.kind == "cpu" else ("float16",)

    def try_out(
        self, config: TrainConfig, fit: Fit, *, decoder: Decoder, examples: Sequence[TrainingExample]
    ) -> tuple[TrainConfig, Fit]:
        """Probe the choice, a single short row first, and choose again where it takes more than was predicted.

        Raises:
            CapacityError: nothing fits after all.
        """
        self.config, self.dtype = replace(self.config, precision=config.precision), fit.dtype
        step = self.rows.largest_step
        shortest = [min(step, key=lambda row: int(self.rows.lengths[row]))]
        for rows in (shortest, step):
            for _ in range(MOST_TRIES):
                result = self._probe(config, rows, decoder=decoder, examples=examples)
                if self._taken(fit.components) + fit.spare_bytes // 2 <= self.budget:
                    break
                config, fit = self.choose(self.budget)
        fit = replace(
            fit,
            correction_bytes=self.correction,
            measured_peak_bytes=max(0, result.peak_bytes - self.start_bytes),
            tokens_per_s=result.tokens_per_s,
        )
        return config, fit

    def _probe(
        self,
        config: TrainConfig,
        rows: Sequence[int],
        *,
        decoder: Decoder,
        examples: Sequence[TrainingExample],
    ) -> ProbeResult:
        """Try `rows` out; what they take beyond the prediction corrects all others."""
        result = try_out(decoder, [examples[row] for row in rows], config, state_bytes=self.state_bytes(config))
        expected = self.start_bytes + sum(self.components(config, rows=list(rows)).values())
        self.correction = max(self.correction, result.peak_bytes - expected)
        return result

    def state_bytes(self, config: TrainConfig) -> int:
        """Of the optimizer, on the device."""
        return 0 if config.offload_optimizer else self.components(config)["optimizer"]


def try_out(decoder: Decoder, rows: Sequence[TrainingExample], config: TrainConfig, *, state_bytes: int) -> ProbeResult:
    """The probe, measured as the budget is counted; see `train.probe`."""
    return probe(decoder, rows, config=config, state_bytes=state_bytes, metered=_metered)


def kept_of(checkpoint: Checkpoint, config: TrainConfig) -> tuple[TrainConfig, str]:
    """The settings and the base's dtype that the run of a checkpoint chose: one that goes on is cut up as before."""
    saved: dict[str, Any] = checkpoint.identity["train"]
    chosen = replace(config, **{name: saved[name] for name in CHOSEN if name in saved})
    return chosen, str(checkpoint.identity["base"]["dtype"])


@dataclass(frozen=True)
class _Counted:
    """A meter as budgets are counted: of the card where there is one."""

    meter: MemoryMeter

    @property
    def start_bytes(self) -> int:
        return self.meter.start_bytes

    @property
    def peak_bytes(self) -> int:
        return self.meter.reading().device_peak_bytes


@contextmanager
def _metered() -> Iterator[_Counted]:
    with MemoryMeter(trim=False) as meter:
        yield _Counted(meter)


def _spare(parts: dict[str, int]) -> int:
    """What a prediction cannot know, to be left free."""
    moving = sum(size for name, size in parts.items() if name not in _WEIGHTS)
    return int(overheads.FIT_SPARE_BYTES + overheads.FIT_SPARE_SHARE * moving)


def _budget(needed: int) -> str:
    """A budget that will do, as --memory takes it."""
    return f"{-(-(needed + BUDGET_STEP // 2) // BUDGET_STEP) * BUDGET_STEP >> 20}MiB"


def describe(fit: Fit) -> str:
    """One line for people."""
    start = f" of {format_bytes(fit.start_bytes)}" if fit.start_bytes else ""
    parts = [
        f"{fit.setting}, base in {fit.dtype}",
        f"predicted {format_bytes(fit.predicted_peak_bytes)} over the start{start}",
    ]
    if fit.measured_peak_bytes is not None:
        parts.append(f"tried {format_bytes(fit.measured_peak_bytes)} at {format_rate(fit.tokens_per_s)} tokens/s")
    return f"for {format_bytes(fit.budget_bytes)}: {'; '.join(parts)}: {fit.reason}"
