"""Checkpoint folders: whole or not at all, damage is noticed, the last ones are kept, a full disk harms nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import CheckpointError
from burnish.models import checkpoint_writing
from burnish.train.checkpoints import Checkpoint, CheckpointFolder, find_checkpoint, first_difference
from burnish.train.results import EvalRecord, StepRecord
from burnish.train.state import RunState, capture, from_json, restore, to_json


class Memory:
    """A part of a run with a state of every kind."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state or {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return {
        "a": torch.nn.Parameter(torch.randn(3, 4, generator=source)),
        "b": torch.nn.Parameter(torch.randn(5, generator=source).bfloat16()),
    }


def snapshot(step: int = 3, *, trained: dict[str, torch.nn.Parameter] | None = None, **parts: Memory) -> Any:
    record = StepRecord(
        step=1, loss=math.nan, tokens=5, label_tokens=4, seconds=0.1, learning_rate=1e-3, grad_norm=math.inf
    )
    state = RunState(step=step, best_loss=0.1 + 0.2, best_step=2, steps=[record], evals=[])
    state.evals.append(EvalRecord(step=1, loss=1 / 3, seconds=0.5, figures={"score": 0.7}))
    return capture(state, parameters=trained or parameters(), parts=parts, device=torch.device("cpu"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path, said: list[str]) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", identity={"seed": 1}, notify=said.append)


def steps_after(folder: CheckpointFolder, steps: list[int], **options: Any) -> list[int]:
    for step in steps:
        assert folder.save(snapshot(step), **{"keep_last": 2, **options})
    return folder.steps()


def test_what_is_saved_comes_back_bit_for_bit(folder: CheckpointFolder) -> None:
    memory = Memory(
        {
            "state": {0: {"step": torch.tensor(7.0), "square": torch.rand(3).double()}, 3: {"codes": torch.arange(9)}},
            "groups": [{"betas": (0.9, 0.999), "params": [0, 3], "rate": math.inf, "name": None, "on": True}],
            "empty": torch.zeros(0, 4),
        }
    )
    torch.manual_seed(11)
    assert folder.save(snapshot(trained=parameters(4), memory=memory), keep_last=2)
    drawn = torch.rand(5)
    torch.manual_seed(12)
    found, fresh, trained = folder.newest(), Memory(), parameters(5)
    assert found is not None
    state = restore(
        found.values, steps=found.steps, evals=found.evals, tensors=found,
        parameters=trained, parts={"memory": fresh}, device=torch.device("cpu"),
    )  # fmt: skip
    assert all(torch.equal(trained[name], value) for name, value in parameters(4).items())
    assert torch.equal(torch.rand(5), drawn)
    flat = torch.utils._pytree.tree_flatten
    (values, form), (expected, expected_form) = flat(fresh.state), flat(memory.state)
    assert form == expected_form
    for value, wanted in zip(values, expected):
        assert (
            torch.equal(value, wanted) and value.dtype == wanted.dtype if torch.is_tensor(wanted) else value == wanted
        )
    assert (state.step, state.best_loss, state.best_step) == (3, 0.1 + 0.2, 2)
    assert math.isnan(state.steps[0].loss)
    assert state.steps[0].grad_norm == math.inf
    assert state.evals[0] == EvalRecord(step=1, loss=1 / 3, seconds=0.5, figures={"score": 0.7})


def test_json_of_a_checkpoint_is_strict(folder: CheckpointFolder) -> None:
    folder.save(snapshot(), keep_last=1)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (folder.place(3) / "steps.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    json.loads((folder.place(3) / "state.json").read_text(), parse_constant=refuse)


def test_keys_that_look_like_marks_survive() -> None:
    value = {"$tensor": "no", "deep": [{"$float": 1}], 2: (1, [2.5, -math.inf])}
    assert from_json(json.loads(json.dumps(to_json(value, {}, name="x"))), None) == value  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x\.a.*object"):
        to_json({"a": object()}, {}, name="x")


def test_other_parameters_are_refused_by_name(folder: CheckpointFolder) -> None:
    folder.save(snapshot(), keep_last=1)
    found = folder.newest()
    assert found is not None

    def attempt(trained: dict[str, torch.nn.Parameter]) -> None:
        restore(
            found.values, steps=[], evals=[], tensors=found, parameters=trained, parts={}, device=torch.device("cpu")
        )

    with pytest.raises(CheckpointError, match=r"the checkpoint, but not the run, trains b"):
        attempt({"a": parameters()["a"]})
    with pytest.raises(CheckpointError, match=r"the run, but not the checkpoint, trains c"):
        attempt({**parameters(), "c": parameters()["a"]})
    with pytest.raises(CheckpointError, match=r"b is another one.*bfloat16.*float32"):
        attempt({**parameters(), "b": torch.nn.Parameter(torch.zeros(5))})


def test_the_last_and_the_best_are_kept(folder: CheckpointFolder) -> None:
    assert steps_after(folder, [2, 4, 6, 8]) == [6, 8]
    assert steps_after(folder, [10, 12], keep_step=8) == [8, 10, 12]
    assert steps_after(folder, [14], keep_last=None) == [8, 10, 12, 14]
    assert steps_after(folder, [1_000_001], keep_last=1) == [1_000_001], "seven digits sort after six"


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "steps.jsonl", "evals.jsonl", "checksums.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    folder: CheckpointFolder, said: list[str], name: str, harm: str
) -> None:
    steps_after(folder, [2, 4])
    path = folder.place(4) / name
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    found = folder.newest()
    assert found is not None
    assert found.step == 2
    assert len(said) == 1
    assert "checkpoint-000004 is damaged" in said[0]
    assert name in said[0] or name == "checksums.json"
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(folder.place(4))
    assert folder.save(snapshot(4), keep_last=2), "it is replaced when the run comes by again"
    assert folder.newest().step == 4  # type: ignore[union-attr]
    assert not list(folder.path.glob(".*"))


def test_leftovers_are_ignored_and_cleared(folder: CheckpointFolder, tmp_path: Path) -> None:
    steps_after(folder, [2])
    for kind in ("new", "old"):
        (folder.path / f".checkpoint-000004.99.{kind}").mkdir()
    (folder.path / "notes").mkdir()
    assert not folder.is_ours()
    assert folder.steps() == [2]
    folder.clear_leftovers()
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoint-000002", "notes"]
    (folder.path / "notes").rmdir()
    assert folder.is_ours()
    folder.clear()
    assert not folder.path.exists()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk_keeps_the_previous_one_and_says_so_once(
    folder: CheckpointFolder, said: list[str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    steps_after(folder, [2])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert not folder.save(snapshot(4), keep_last=2)
        assert not folder.save(snapshot(6), keep_last=2)
    assert len(said) == 1
    assert all(part in said[0] for part in ("no checkpoint after step 4", "step 2 stays", "no space left"))
    assert os.listdir(folder.path) == ["checkpoint-000002"]
    assert folder.newest().step == 2  # type: ignore[union-attr]
    assert steps_after(folder, [8]) == [2, 8]


def test_full_disk_in_the_middle_of_a_file_leaves_nothing(
    folder: CheckpointFolder, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_writing.replacing

    class Filling:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    @contextlib.contextmanager
    def filling(path: Path) -> Iterator[Filling]:
        with real(path) as file:
            yield Filling(file)

    monkeypatch.setattr(checkpoint_writing, "replacing", filling)
    assert not folder.save(snapshot(2, memory=Memory({"x": torch.ones(4), "y": torch.ones(4)})), keep_last=2)
    assert "there is none yet" in said[0]
    assert not folder.path.exists()


def test_weights_that_are_not_finite_are_never_saved(folder: CheckpointFolder, said: list[str]) -> None:
    steps_after(folder, [2])
    broken = parameters()
    with torch.no_grad():
        broken["b"][1] = math.inf
    assert not folder.save(snapshot(4, trained=broken), keep_last=1)
    assert folder.steps() == [2]
    assert "not finite" in said[0]


def test_a_path_names_a_checkpoint_or_the_newest_in_a_folder(folder: CheckpointFolder) -> None:
    steps_after(folder, [2, 4])
    for path, step in ((folder.path.parent, 4), (folder.path, 4), (folder.place(2), 2)):
        assert find_checkpoint(path).step == step  # type: ignore[union-attr]
    assert find_checkpoint(folder.path / "nothing") is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        find_checkpoint(folder.place(3))


def test_another_version_of_the_format_is_refused(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.train import checkpoints

    folder.save(snapshot(2), keep_last=1)
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="another version; got format 1; expected 2"):
        Checkpoint(folder.place(2))


def test_first_difference_names_the_innermost_key() -> None:
    saved = {"train": {"rate": 0.1, "seed": 1}, "lora": None}
    assert first_difference(saved, {"train": {"rate": 0.1, "seed": 1}, "lora": None}) is None
    assert first_difference(saved, {"train": {"rate": 0.2, "seed": 2}, "lora": None}) == ("train.rate", 0.1, 0.2)
    assert first_difference(saved, {"train": {"rate": 0.1, "seed": 1}, "lora": {"rank": 4}})[0] == "lora"  # type: ignore[index]
    assert first_difference({"a": 1}, {}) == ("a", 1, None)
