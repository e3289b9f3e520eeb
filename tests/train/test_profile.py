"""The clock of a step: where time goes, what memory is counted, and what it all costs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.plan.timing import TrainingOperations
from burnish.train import profile as profile_module
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters
from burnish.train.profile import COMPONENTS, READINGS, StepClock, StepProfile, operations_of, peak_rate
from burnish.train.results import StepRecord


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def spend(clock: StepClock, time: Time, phase: str, seconds: float) -> None:
    with clock.mark(phase):
        time.now += seconds


def test_time_goes_to_the_phase_it_was_spent_in(time: Time) -> None:
    clock = StepClock(now=time)
    for seconds in (1.0, 2.0):
        spend(clock, time, "forward", seconds)
        spend(clock, time, "backward", 2 * seconds)
    time.now += 0.25
    first = clock.finish_step(seconds=9.25)
    assert first.phases == {"forward": 3.0, "backward": 6.0, "other": 0.25}
    spend(clock, time, "evaluation", 5.0)
    spend(clock, time, "data", 0.5)
    assert clock.finish_step(seconds=0.5).phases == {"data": 0.5, "evaluation": 5.0, "other": 0.0}
    spend(clock, time, "saving", 4.0)
    assert clock.finish() == {
        "forward": 3.0, "backward": 6.0, "other": 0.25, "evaluation": 5.0, "data": 0.5, "saving": 4.0,
    }  # fmt: skip


def test_nested_phases_are_not_counted_twice(time: Time) -> None:
    clock = StepClock(now=time)
    with clock.mark("evaluation"):
        time.now += 1.0
        spend(clock, time, "forward", 2.0)
        time.now += 4.0
    with contextlib.suppress(ValueError), clock.mark("backward"):
        time.now += 8.0
        raise ValueError
    phases = clock.finish_step(seconds=1.0).phases
    assert (phases["evaluation"], phases["forward"], phases["backward"]) == (5.0, 2.0, 8.0)


def test_long_phases_are_announced(time: Time) -> None:
    heard: list[str] = []
    clock = StepClock(on_phase=heard.append, now=time)
    for phase in ("forward", "evaluation", "optimizer", "saving"):
        spend(clock, time, phase, 1.0)
    assert heard == ["evaluation", "saving"]


def test_rate_of_the_arithmetic_and_its_share_of_the_peak(make_decoder: Callable[..., Any], time: Time) -> None:
    model = make_decoder()
    operations = TrainingOperations(per_token=10.0, per_label=100.0, per_square=1.0)

    def profile(peak: float | None, cost: TrainingOperations | None = operations) -> StepProfile:
        clock = StepClock(now=time)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clock.attach(model, model.parameters(), optimizer, device=torch.device("cpu"), operations=cost, peak_rate=peak)
        return clock.finish_step(seconds=2.0, tokens=7, label_tokens=3, squared_lengths=25)

    assert profile(1000.0).flops_per_s == (70 + 300 + 25) / 2
    assert profile(1000.0).peak_share == pytest.approx(0.1975)
    assert profile(None).peak_share is None
    assert profile(1000.0, None) == profile(None, None) == StepProfile(phases={"other": 0.0})


def test_memory_is_counted_by_component_at_the_marks(make_decoder: Callable[..., Any], time: Time) -> None:
    model = make_decoder()
    base = sum(parameter.numel() for parameter in model.parameters())
    attach_lora(model, LoraConfig(rank=4), seed=0)
    model.requires_grad_(False)
    parameters = lora_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    adapter = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    clock = StepClock(start_bytes=0, now=time)
    clock.attach(model, parameters, optimizer, device=torch.device("cpu"))
    for size in (8, 16, 4):
        with clock.mark("forward", size=size):
            loss = model(torch.arange(size)[None]).sum()
            clock.saved(1000 * size)
        with clock.mark("backward"):
            loss.backward()
    with clock.mark("optimizer"):
        optimizer.step()
    memory = clock.finish_step(seconds=1.0).memory
    assert list(memory) == ["forward", "backward", "step"]
    assert all(tuple(parts) == COMPONENTS for parts in memory.values())
    assert {parts["weights"] for parts in memory.values()} == {4 * (base + adapter)}
    assert memory["forward"]["activations"] == 16_000, "of the largest micro-batch"
    assert memory["backward"]["activations"] == memory["step"]["activations"] == 0
    assert memory["backward"]["gradients"] == 4 * adapter
    assert memory["forward"]["optimizer"] == memory["backward"]["optimizer"] == 0
    assert 8 * adapter <= memory["step"]["optimizer"] <= 8 * adapter + 1000
    assert all(parts["other"] > 50 * 2**20 for parts in memory.values()), "the process itself, as it began with nothing"
    assert sum(clock.highest.values()) >= sum(memory["forward"].values()), "when activations are alive"


def test_start_of_the_process_is_left_out(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    clock = StepClock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock.attach(model, model.parameters(), optimizer, device=torch.device("cpu"))
    with clock.mark("forward", size=1):
        pass
    assert clock.finish_step(seconds=1.0).memory["forward"]["other"] < 50 * 2**20


def test_resident_set_is_read_a_few_times_however_many_micro_batches(
    make_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    real = profile_module._Ledger.read
    monkeypatch.setattr(profile_module._Ledger, "read", lambda self, **k: reads.append(1) or real(self, **k))
    model = make_decoder()
    clock = StepClock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock.attach(model, model.parameters(), optimizer, device=torch.device("cpu"))
    for _ in range(2):
        reads.clear()
        for size in range(1, 33):
            with clock.mark("forward", size=size):
                pass
        with clock.mark("optimizer"):
            pass
        clock.finish_step(seconds=1.0)
        assert len(reads) == READINGS


class FakeEvent:
    """A CUDA event: a moment of a stream that the test moves."""

    stream = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = FakeEvent.stream

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.moment - self.moment)


def test_on_cuda_time_is_the_streams_and_memory_the_allocators(
    make_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"allocated": 0, "reserved": 0}
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held["reserved"])
    model = make_decoder()
    monkeypatch.setattr(profile_module._Ledger, "_here", lambda self, tensors: list(tensors))
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    held.update(allocated=weights + 500, reserved=weights + 700)
    clock = StepClock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock.attach(model, model.parameters(), optimizer, device=torch.device("cuda"))
    with clock.mark("forward", size=4):
        FakeEvent.stream += 2.0
        held.update(allocated=weights + 500 + 40_000, reserved=weights + 500 + 50_000)
    with clock.mark("backward"):
        FakeEvent.stream += 3.0
    done = clock.finish_step(seconds=5.0)
    assert (done.phases["forward"], done.phases["backward"]) == (2.0, 3.0)
    assert done.memory["forward"] == {
        "weights": weights, "gradients": 0, "optimizer": 0, "activations": 40_000, "other": 10_000 + 500,
    }  # fmt: skip
    FakeEvent.stream += 1.5
    assert clock.finish_step(seconds=1.5).phases == {"other": 1.5}


def test_step_record_gives_a_tracker_numbers_only() -> None:
    memory = {"forward": {"weights": 10, "other": 5}, "step": {"weights": 10, "other": 1}}
    record = StepRecord(
        step=3, loss=2.0, tokens=100, label_tokens=50, seconds=0.5, learning_rate=1e-3, grad_norm=0.7, memory=memory
    )
    assert record.memory_bytes == 15
    assert record.figures() == {
        "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.7, "tokens_per_s": 200.0, "memory_bytes": 15.0,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_decoder_are_those_its_matrix_products_execute(
    make_decoder: Callable[..., Any], tied: bool
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make_decoder(tie_word_embeddings=tied)
    model.requires_grad_(True)
    cost = operations_of(model, recomputed=0.0)
    assert cost is not None
    tokens = torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # The counter knows matrix products and not the fused attention of the CPU.
    assert counter.get_total_flops() == cost.of(tokens=16, label_tokens=16, squared_lengths=0)


def test_adapter_over_frozen_weights_saves_their_own_gradients(make_decoder: Callable[..., Any]) -> None:
    model = make_decoder()
    full = operations_of(model.requires_grad_(True), recomputed=0.0)
    weights = sum(value.numel() for name, value in model.named_parameters() if name.endswith("_proj.weight"))
    attach_lora(model, LoraConfig(rank=4), seed=0)
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    adapter = sum(parameter.numel() for parameter in lora_parameters(model))
    plain, again = (operations_of(model, recomputed=share) for share in (0.0, 0.5))
    assert full is not None
    assert plain is not None
    assert again is not None
    assert (full.per_token, plain.per_token) == (6 * weights, 4 * weights + 6 * adapter)
    assert again.per_token - plain.per_token == weights + adapter
    assert plain.per_label == full.per_label * 2 / 3
    assert operations_of(torch.nn.Linear(2, 2), recomputed=0.0) is None


def test_peak_rate_is_a_known_cards_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.plan.hardware import Card

    def set_cards(*names: str) -> None:
        found = tuple(Card(name=name, memory_bytes=81559 * 2**20, driver="1") for name in names)
        monkeypatch.setattr(profile_module, "cards", lambda: found)
        monkeypatch.setattr("burnish.plan.hardware.cards", lambda: found)

    cuda = torch.device("cuda")
    set_cards("NVIDIA H100 80GB HBM3")
    assert peak_rate(torch.device("cpu"), precision="bfloat16") is None
    assert peak_rate(cuda, precision="bfloat16") == 989e12
    assert peak_rate(cuda, precision="float32") == 67e12
    set_cards("NVIDIA H100 80GB HBM3", "NVIDIA T4")
    assert peak_rate(cuda, precision="bfloat16") is None, "which one it is cannot be told"
    set_cards("Some other card")
    assert peak_rate(cuda, precision="bfloat16") is None
