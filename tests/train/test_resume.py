"""Runs that stop and go on: every bit as if they had never stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import fingerprint, tiny_rows, tiny_train

from burnish.errors import BurnishError, CheckpointError, ConfigError
from burnish.train.checkpoints import CheckpointFolder
from burnish.train.config import TrainConfig
from burnish.train.results import StepRecord, TrainResult
from burnish.train.state import RunState
from burnish.train.step import StepRunner, StepTotals
from burnish.train.stopping import EarlyStopping, StopRequest, stop_on_signals

HELD_OUT = tiny_rows(5, seed=9)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def stopping_after(step: int, stop: StopRequest) -> Any:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            stop.request()

    return on_step


def interrupted(step: int, folder: CheckpointFolder, **options: Any) -> TrainResult:
    stop = StopRequest()
    result = tiny_train(checkpoints=folder, stop=stop, on_step=stopping_after(step, stop), **options)
    assert result.interrupted
    assert len(result.steps) == step
    return result


def test_killed_at_twenty_moments_every_bit_is_as_without(tmp_path: Path) -> None:
    program = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "20"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == {"all": 10, "saving": 10}
    assert figures["leftovers"] >= 5, "no kill came in the middle of a save"
    assert figures["resumed"] >= 3
    assert figures["different"] == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3, "schedule": "linear", "ordering": "shuffled"},
        {"method": "full", "learning_rate": 1e-3, "gradient_accumulation": 1},
        {"precision": "bfloat16", "ordering": "given", "max_grad_norm": None},
        {"gradient_accumulation": 3, "micro_batch_size": 1, "schedule": "constant"},
    ],
    ids=["lora", "dropout", "full", "bfloat16", "accumulated"],
)
def test_stopped_twice_every_bit_is_as_without(folder: CheckpointFolder, options: dict[str, Any]) -> None:
    options = {**options, "eval_examples": HELD_OUT, "eval_every": 2}
    whole = tiny_train(**options)
    assert len({step.loss for step in whole.steps}) == 11
    first = interrupted(4, folder, **options)
    second = interrupted(7, folder, resume=folder.newest(), **options)
    last = tiny_train(checkpoints=folder, resume=folder.newest(), **options)
    assert fingerprint(last) == fingerprint(whole)
    assert [run.resumed_from for run in (whole, first, second, last)] == [None, None, 4, 7]
    # A resumed run's wall time holds that of the steps before it.
    assert all(run.seconds >= sum(step.seconds for step in run.steps) > 0 for run in (whole, first, second, last))
    assert last.steps[:7] == second.steps


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_other_optimizers_resume_bit_for_bit(folder: CheckpointFolder, optimizer: str) -> None:
    options = {"optimizer": optimizer, "learning_rate": 1e-3, "method": "full"}
    whole = tiny_train(**options)
    interrupted(5, folder, **options)
    assert fingerprint(tiny_train(checkpoints=folder, resume=folder.newest(), **options)) == fingerprint(whole)


def test_the_evaluation_that_a_stop_left_out_is_made_first(folder: CheckpointFolder) -> None:
    options: dict[str, Any] = {"eval_examples": HELD_OUT, "eval_every": 4}
    stopped = interrupted(4, folder, **options)
    assert stopped.eval == []
    assert [item.step for item in tiny_train(resume=folder.newest(), **options).eval] == [4, 8, 11]
    assert interrupted(8, folder, resume=folder.newest(), **options).eval[0].step == 4


def test_a_run_that_is_done_is_not_trained_further(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", save_at_end=True)
    options: dict[str, Any] = {"eval_examples": HELD_OUT}
    whole = tiny_train(checkpoints=folder, **options)
    assert folder.steps() == [11]
    again = tiny_train(checkpoints=folder, resume=folder.newest(), **options)
    assert fingerprint(again) == fingerprint(whole)
    assert again.steps == whole.steps


def test_checkpoints_come_when_due_and_go_when_old(folder: CheckpointFolder) -> None:
    seen: list[list[int]] = []
    tiny_train(checkpoints=folder, save_every=3, keep_last=2, on_step=lambda record: seen.append(folder.steps()))
    assert seen[3] == [3]
    assert seen[6] == [3, 6]
    assert folder.steps() == [6, 9]


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(folder: CheckpointFolder) -> None:
    whole = tiny_train(save_every=2, checkpoints=folder)
    (folder.place(10) / "tensors.safetensors").write_bytes(b"")
    found = folder.newest()
    assert found is not None
    assert found.step == 8
    assert fingerprint(tiny_train(save_every=2, checkpoints=folder, resume=found)) == fingerprint(whole)
    assert folder.steps() == [8, 10]
    assert folder.newest().step == 10  # type: ignore[union-attr]


def broken_steps(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> list[int]:
    """Loss and gradients of these calls are NaN; returns the list that counts calls."""
    real, calls = StepRunner.accumulate, []

    def accumulate(self: StepRunner, rows: Any) -> StepTotals:
        calls.append(1)
        totals = real(self, rows)
        if len(calls) not in bad:
            return totals
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        return replace(totals, loss=math.nan)

    monkeypatch.setattr(StepRunner, "accumulate", accumulate)
    return calls


def test_bad_steps_are_counted_across_a_resume(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = broken_steps(monkeypatch, {3, 4, 8})
    whole = tiny_train(max_bad_steps=3)
    assert whole.skipped_steps == 3
    calls.clear()
    interrupted(4, folder, max_bad_steps=3)
    again = tiny_train(checkpoints=folder, resume=folder.newest(), max_bad_steps=3)
    assert fingerprint(again) == fingerprint(whole)
    assert again.skipped_steps == 3
    calls.clear()
    folder.clear()
    interrupted(4, folder, max_bad_steps=3)
    calls[:] = [1, 1]  # so that the next one is bad again
    with pytest.raises(BurnishError, match=r"step 5.*3 steps in a row"):
        tiny_train(checkpoints=folder, resume=folder.newest(), max_bad_steps=3)


def test_bad_steps_take_the_place_of_no_good_checkpoint(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_steps(monkeypatch, {5, 6, 7, 8})
    with pytest.raises(BurnishError, match="4 steps in a row"):
        tiny_train(checkpoints=folder, save_every=1, keep_last=1, max_bad_steps=4)
    assert folder.steps() == [4]


def test_a_due_checkpoint_waits_for_the_next_good_step(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_steps(monkeypatch, {4, 5})
    tiny_train(checkpoints=folder, save_every=4, keep_last=9)
    assert folder.steps() == [6, 8]


def test_full_disk_does_not_stop_training(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    full = CheckpointFolder(folder.path, notify=said.append)

    def no_space(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    whole = tiny_train(eval_examples=HELD_OUT, eval_every=3, keep_best=True)
    monkeypatch.setattr(os, "fsync", no_space)
    result = tiny_train(checkpoints=full, save_every=2, eval_examples=HELD_OUT, eval_every=3, keep_best=True)
    assert fingerprint(result) == fingerprint(whole)
    assert len(said) == 1
    assert not folder.path.exists()


def overfitting(**options: Any) -> TrainResult:
    """The evaluation loss falls, then rises again."""
    settings = {"method": "full", "learning_rate": 2e-2, "steps": 40, "schedule": "constant", "eval_every": 1}
    return tiny_train(**{**settings, "eval_examples": HELD_OUT, **options})


def test_early_stopping_stops_after_its_patience(folder: CheckpointFolder) -> None:
    result = overfitting(early_stopping_patience=3)
    losses = [item.loss for item in result.eval]
    assert result.stopped == "early_stopping"
    assert len(losses) < 40
    best = losses.index(min(losses)) + 1  # type: ignore[type-var]
    assert (result.best_step, len(losses)) == (best, best + 3)
    interrupted_at = len(losses) - 1
    stop = StopRequest()
    overfitting(early_stopping_patience=3, checkpoints=folder, stop=stop, on_step=stopping_after(interrupted_at, stop))
    again = overfitting(early_stopping_patience=3, checkpoints=folder, resume=folder.newest())
    assert fingerprint(again) == fingerprint(result)


@pytest.mark.parametrize("saved", [True, False])
def test_best_weights_come_back_at_the_end(folder: CheckpointFolder, saved: bool) -> None:
    place = {"checkpoints": folder} if saved else {}
    result = overfitting(early_stopping_patience=3, keep_best=True, **place)
    assert result.best_kept
    assert result.best_step is not None
    shorter = overfitting(steps=result.best_step)
    assert fingerprint(shorter)["weights"] == fingerprint(result)["weights"]
    assert fingerprint(overfitting(early_stopping_patience=3))["weights"] != fingerprint(result)["weights"]
    assert not saved or folder.steps()[-1] == result.best_step


def test_best_weights_of_an_earlier_session_come_back(folder: CheckpointFolder) -> None:
    whole = overfitting(early_stopping_patience=4, keep_best=True)
    assert whole.best_step is not None
    stop = StopRequest()
    options: dict[str, Any] = {"early_stopping_patience": 4, "keep_best": True, "keep_last": 1, "checkpoints": folder}
    overfitting(**options, stop=stop, on_step=stopping_after(whole.best_step + 2, stop))
    assert folder.steps() == [whole.best_step, whole.best_step + 2]
    again = overfitting(**options, resume=folder.newest())
    assert fingerprint(again) == fingerprint(whole)


def test_best_step_whose_evaluation_a_stop_left_out_is_found_again(folder: CheckpointFolder) -> None:
    options: dict[str, Any] = {"early_stopping_patience": 4, "keep_best": True, "checkpoints": folder}
    whole = overfitting(early_stopping_patience=4, keep_best=True)
    assert whole.best_step is not None
    stop = StopRequest()
    stopped = overfitting(**options, stop=stop, on_step=stopping_after(whole.best_step, stop))
    assert len(stopped.eval) == whole.best_step - 1
    assert fingerprint(overfitting(**options, resume=folder.newest())) == fingerprint(whole)


def test_small_gains_add_up_to_one() -> None:
    state = RunState()
    watch = EarlyStopping(TrainConfig(eval_every=1, early_stopping_patience=2, early_stopping_min_delta=0.1), state)
    seen = []
    for step, loss in enumerate([1.0, 0.95, 0.89, math.nan, 0.88], 1):
        state.step = step
        seen.append((watch.observe(loss), state.without_gain, watch.exhausted))
    assert seen == [(True, 0, False), (True, 1, False), (True, 0, False), (False, 1, False), (True, 2, True)]
    assert (state.best_step, state.best_loss) == (5, 0.88)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_at_hand(folder: CheckpointFolder, number: int) -> None:
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    real = StepRunner.accumulate

    def accumulate(self: StepRunner, rows: Any) -> StepTotals:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(self, rows)

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "accumulate", accumulate)
        result = tiny_train(checkpoints=folder)
    assert result.stopped == "interrupted"
    assert folder.steps() == [len(result.steps)] == [2]
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert fingerprint(tiny_train(resume=folder.newest())) == fingerprint(tiny_train())


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    said: list[str] = []
    with stop_on_signals(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen: list[Any] = []

    def work() -> None:
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_what_cannot_be_honoured_is_refused(folder: CheckpointFolder) -> None:
    for options, part in (
        ({"save_every": 2}, "needs a folder"),
        ({"keep_best": True, "eval_every": 2}, "rows for evaluation"),
        ({"early_stopping_patience": 2, "eval_every": 2}, "rows for evaluation"),
        ({"keep_best": True}, "Give eval_every"),
        ({"early_stopping_patience": 2}, "Give eval_every"),
        ({"early_stopping_min_delta": 0.1}, "early_stopping_patience"),
        ({"keep_last": 0}, "keep_last"),
        ({"save_every": -1}, "save_every"),
    ):
        with pytest.raises(ConfigError, match=part):
            tiny_train(**options)
    interrupted(2, folder)
    with pytest.raises(CheckpointError, match="trains lm_head"):
        tiny_train(resume=folder.newest(), method="full")


def test_optimizer_state_keeps_its_dtype(folder: CheckpointFolder) -> None:
    """Torch would cast a float32 mean of a bfloat16 parameter to bfloat16, and codes to a float."""
    from burnish.train.state import capture, restore

    def made() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        trained = {"a": torch.nn.Parameter(torch.ones(3).bfloat16())}
        return trained, torch.optim.SGD(trained.values(), lr=0.1)

    trained, optimizer = made()
    optimizer.state[trained["a"]] = {"mean": torch.tensor([1.0, 1e-3, 1 / 3]), "codes": torch.arange(3).byte()}
    device = torch.device("cpu")
    folder.save(capture(RunState(), parameters=trained, parts={"optimizer": optimizer}, device=device), keep_last=1)
    found, (again, other) = folder.newest(), made()
    assert found is not None
    restore(
        found.values, steps=[], evals=[], tensors=found, parameters=again, parts={"optimizer": other}, device=device
    )
    for name, value in optimizer.state[trained["a"]].items():
        assert other.state[again["a"]][name].dtype == value.dtype
        assert torch.equal(other.state[again["a"]][name], value)
