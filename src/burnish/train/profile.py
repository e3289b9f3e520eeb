"""Where a training step's time and memory go: cheap enough to be on always.

The loop and the step call `StepClock.mark` around their phases. On the CPU, time is wall time and memory is counted
from tensors, with the resident set read at most `READINGS` times a step. On CUDA, time is taken by events on the stream
and memory from the allocator's counters, so nothing waits before the step's end. A trace of single operators is in
`trace.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from burnish.models.config import ModelConfig
from burnish.plan.hardware import cards, this_card
from burnish.plan.timing import TrainingOperations, training_operations
from burnish.train.footprint import storage_bytes

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "saving")
OTHER = "other"
"""Time outside every phase: callbacks, logging. As a component of memory: what no tensor of the run accounts for."""

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "other")
MARKS = ("forward", "backward", "step")
READINGS = 4  # of the resident set per step: two of forward at most, then backward and step


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One step's profile.

    Attributes:
        phases: seconds by phase since the step before, so evaluation and saving are those that came in between.
        memory: bytes by component after the largest forward pass, after the last backward pass and after the update
            (`MARKS`). On the CPU over the start of the process; on CUDA the allocator's, "other" being what it keeps.
        flops_per_s: operations per second of the model's arithmetic; None where its cost is unknown.
        peak_share: of the device's peak rate, 0..1; None where that rate is unknown.
    """

    phases: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    flops_per_s: float | None = None
    peak_share: float | None = None


class StepClock:
    """Measures a run's steps.

        with clock.mark("forward", size=positions):
            loss = ...
            clock.saved(num_bytes)
        ...
        profile = clock.finish_step(seconds=..., tokens=..., label_tokens=..., squared_lengths=...)

    Phases may nest: time goes to the innermost. Before `attach`, only time is measured.

    Args:
        on_phase: called with "evaluation" or "saving" when such a phase begins.
        start_bytes: resident set before the model was loaded; None takes it from `attach`, less the weights.
        now: seconds, for tests.

    Attributes:
        totals: seconds by phase over all steps that were finished.
        highest: memory after the forward pass that held most: when activations are alive.
    """

    def __init__(
        self,
        *,
        on_phase: Callable[[str], None] | None = None,
        start_bytes: int | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.totals: dict[str, float] = {}
        self.highest: dict[str, int] = {}
        self._on_phase, self._start, self._now = on_phase, start_bytes, now
        self._phase, self._since = OTHER, now()
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, dict[str, int]] = {}
        self._largest, self._readings, self._saved = 0, 0, 0
        self._ledger: _Ledger | None = None
        self._events: _Events | None = None
        self._operations: TrainingOperations | None = None
        self._peak_rate: float | None = None

    def attach(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        operations: TrainingOperations | None = None,
        peak_rate: float | None = None,
    ) -> None:
        """Say what is trained; time counts from here.

        Args:
            model: its parameters and buffers are the weights, as they are while training.
            parameters: those that are trained.
            optimizer: its state is counted when it has one.
            operations: cost of the arithmetic.
            peak_rate: the device's operations per second in the compute dtype.
        """
        self._ledger = _Ledger(model, list(parameters), optimizer, device=device, start_bytes=self._start)
        self._operations, self._peak_rate = operations, peak_rate
        self._events = _Events() if device.type == "cuda" else None
        self._seconds, self._since = {}, self._now()

    @contextmanager
    def mark(self, phase: str, *, size: int = 0) -> Iterator[None]:
        """Count the block's time as `phase`, and name it in a trace.

        Args:
            phase: one of `PHASES`.
            size: positions of a forward pass; memory is read after the largest.
        """
        if phase == "optimizer":
            self._read("backward")
        elif phase in ("evaluation", "saving") and self._on_phase is not None:
            self._on_phase(phase)
        outer = self._enter(phase)
        try:
            with record_function(phase):
                yield
        finally:
            self._enter(outer)
        if phase == "optimizer":
            self._read("step")
        elif phase == "forward" and size > self._largest and self._readings < READINGS - 2:
            self._largest = size
            self._read("forward")

    def saved(self, num_bytes: int) -> None:
        """Say how many bytes the forward pass at hand keeps for the backward pass; CUDA reads that itself."""
        self._saved = num_bytes

    def finish_step(
        self, *, seconds: float, tokens: int = 0, label_tokens: int = 0, squared_lengths: int = 0
    ) -> StepProfile:
        """Close the step and begin the next.

        Args:
            seconds: wall time of the step, without evaluation and saving.
            tokens, label_tokens: of the step's rows.
            squared_lengths: sum of the rows' lengths squared, for attention.
        """
        phases = self._flush()
        rate = share = None
        if self._operations is not None and seconds > 0:
            work = self._operations.of(tokens=tokens, label_tokens=label_tokens, squared_lengths=squared_lengths)
            rate = work / seconds
            share = rate / self._peak_rate if self._peak_rate else None
        profile = StepProfile(phases=phases, memory=self._memory, flops_per_s=rate, peak_share=share)
        self._memory, self._largest, self._readings, self._saved = {}, 0, 0, 0
        return profile

    def finish(self) -> dict[str, float]:
        """Seconds of the whole run by phase, what came after the last step included."""
        self._flush()
        return dict(self.totals)

    def _enter(self, phase: str) -> str:
        """Begin a phase; returns the one that was under way, which the time until now goes to."""
        now, before = self._now(), self._phase
        if self._events is None:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        else:
            self._events.record(before)
        self._phase, self._since = phase, now
        return before

    def _flush(self) -> dict[str, float]:
        self._enter(self._phase)
        if self._events is not None:
            self._seconds = self._events.take()
        seconds, self._seconds = self._seconds, {}
        for phase, spent in seconds.items():
            self.totals[phase] = self.totals.get(phase, 0.0) + spent
        return {phase: seconds[phase] for phase in (*PHASES, OTHER) if phase in seconds}

    def _read(self, mark: str) -> None:
        if self._ledger is None:
            return
        self._readings += 1
        reading = self._ledger.read(activations=self._saved if mark == "forward" else 0)
        self._memory[mark] = reading
        if mark == "forward" and sum(reading.values()) > sum(self.highest.values()):
            self.highest = reading


def operations_of(model: nn.Module, *, recomputed: float) -> TrainingOperations | None:
    """What training the model as it is costs, by what requires gradients; None for a model that is not a decoder.

    Args:
        recomputed: share of the blocks that the backward pass computes again.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    trained = adapter = 0
    head_trained = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" in name:
            adapter += parameter.numel()
        elif name.endswith(head):
            head_trained = True
        elif ".layers." in name and parameter.dim() == 2:
            trained += parameter.numel()
    return training_operations(
        config, trained=trained, adapter=adapter, head_trained=head_trained, recomputed=recomputed
    )


def peak_rate(device: torch.device, *, precision: str) -> float | None:
    """The card's peak operations per second by its data sheet; None where that is unknown, as for every processor."""
    if device.type != "cuda" or len({card.name for card in cards()}) != 1:
        return None
    card = this_card()
    return None if card is None else card.rate(precision)


class _Ledger:
    """Bytes by component; what does not change during a run is counted once."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        start_bytes: int | None,
    ) -> None:
        self._parameters, self._optimizer, self._device = parameters, optimizer, device
        self._weights = storage_bytes(self._here([*model.parameters(), *model.buffers()]))
        self._full_gradients = _covered(self._here(parameters))
        self._state_entries, self._state_bytes = 0, 0
        self._process = psutil.Process()
        if device.type == "cuda":
            self._before = max(0, torch.cuda.memory_allocated(device) - self._weights)
        else:
            self._before = self._process.memory_info().rss - self._weights if start_bytes is None else start_bytes

    def read(self, *, activations: int) -> dict[str, int]:
        parts = {"weights": self._weights, "gradients": self._gradients(), "optimizer": self._optimizer_state()}
        if self._device.type == "cuda":
            allocated = torch.cuda.memory_allocated(self._device)
            free = torch.cuda.memory_reserved(self._device) - allocated
            parts["activations"] = max(0, allocated - self._before - sum(parts.values()))
            parts["other"] = free + self._before
        else:
            held = self._process.memory_info().rss - self._before
            parts["activations"] = activations
            parts["other"] = max(0, held - sum(parts.values()))
        return parts

    def _gradients(self) -> int:
        """Gradients come and go together: two parameters stand for all, which saves a walk over hundreds."""
        present = any(parameter.grad is not None for parameter in (self._parameters[0], self._parameters[-1]))
        return self._full_gradients if present else 0

    def _optimizer_state(self) -> int:
        state = self._optimizer.state
        if len(state) != self._state_entries:
            self._state_entries = len(state)
            tensors = (value for entry in state.values() for value in entry.values() if isinstance(value, Tensor))
            self._state_bytes = _covered(self._here(tensors))
        return self._state_bytes

    def _here(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those on the run's device; of a sharded tensor this process's part."""
        parts = [_own_part(tensor) for tensor in tensors]
        return [part for part in parts if part.device.type == self._device.type]


class _Events:
    """Times between events on the CUDA stream, added up by phase."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self.record(OTHER)

    def record(self, phase: str) -> None:
        """`phase` ends here on the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def take(self) -> dict[str, float]:
        """Seconds by phase up to the last event, which is waited for and stays as the next beginning."""
        self._marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:]):
            seconds[phase] = seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
        del self._marks[:-1]
        return seconds


def _own_part(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _covered(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
