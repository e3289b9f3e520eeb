"""Two processes against one: equal losses, gradients and weights, whatever they divide."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_program
import torch
from torch import nn

from burnish.errors import ConfigError
from burnish.pipeline.launching import launch
from burnish.train.config import SHARDINGS, TrainConfig
from burnish.train.distributed import Ranks, joined, local_device, single
from burnish.train.sharded_optimizer import make_sharded_optimizer

PROGRAM = str(Path(ranks_program.__file__))
CASES = [" ".join(case) for case in itertools.product(ranks_program.METHODS, SHARDINGS)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two gloo processes made of every case."""
    out = tmp_path_factory.mktemp("ranks") / "figures.json"
    assert launch([sys.executable, PROGRAM, str(out)], processes=2, threads=1) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone() -> Callable[[str, str], dict[str, Any]]:
    """What one process makes of it."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def run(method: str, optimizer: str) -> dict[str, Any]:
        if (method, optimizer) not in made:
            made[method, optimizer] = ranks_program.train_steps(single(), method, optimizer=optimizer)
        return made[method, optimizer]

    return run


@pytest.fixture(scope="module")
def trainer_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the trainer makes of it in one process."""
    made: dict[str, dict[str, Any]] = {}

    def run(method: str) -> dict[str, Any]:
        if method not in made:
            made[method] = ranks_program.train_whole(single(), method, tmp_path_factory.mktemp("alone"))
        return made[method]

    return run


EXTRA = [
    *(f"full {sharding} resumed" for sharding in SHARDINGS),
    *(f"lora {sharding} lion" for sharding in SHARDINGS),
    "full none buckets",
    "full zero1 adafactor",
]


@pytest.mark.parametrize("case", [*CASES, *EXTRA])
def test_two_processes_train_as_one(case: str, figures: dict[str, Any], alone: Callable[..., dict[str, Any]]) -> None:
    method, _, *end = case.split()
    reference = alone(method, end[0] if end and end[0] in ("lion", "adafactor") else "adamw")
    got = figures[case]
    assert got["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert got["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert got["weights"] == pytest.approx(reference["weights"], rel=1e-5)
    assert got["final"] == pytest.approx(reference["final"], abs=1e-4)
    assert "FSDP" not in got["kind"]


@pytest.mark.parametrize("end", ["", " stopped"])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("method", ranks_program.METHODS[:2])
def test_trainer_of_two_processes_equals_that_of_one_also_resumed(
    method: str, sharding: str, end: str, figures: dict[str, Any], trainer_alone: Callable[[str], dict[str, Any]]
) -> None:
    got, reference = figures[f"{method} {sharding} trainer{end}"], trainer_alone(method)
    assert got["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert got["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert got["evals"] == pytest.approx(reference["evals"], abs=1e-5)
    assert got["weights"] == pytest.approx(reference["weights"], rel=1e-5)
    assert got["tokens"] == reference["tokens"]
    if end:  # two processes do the same sums in the same order again
        assert got["losses"] == figures[f"{method} {sharding} trainer"]["losses"]


@pytest.mark.parametrize("method", ranks_program.METHODS)
def test_sharded_state_is_about_half(
    method: str, figures: dict[str, Any], alone: Callable[..., dict[str, Any]]
) -> None:
    whole = alone(method, "adamw")["held"]
    assert figures[f"{method} none"]["held"] == whole
    for sharding in SHARDINGS[1:]:
        assert 0.4 * whole < figures[f"{method} {sharding}"]["held"] < 0.6 * whole


def test_ranks_agree_on_flags_and_counts(figures: dict[str, Any]) -> None:
    assert figures["flags"] == [True, False, [2, 1], 5]


@pytest.mark.parametrize(
    ("way", "code", "line"),
    [
        ("failed", 3, "error: row 7 does not fit"),
        ("killed", 137, "error: rank 0 lost the other processes; one of them was killed, or ran out of memory"),
    ],
)
def test_first_error_is_shown_once_and_ends_all(tmp_path: Path, way: str, code: int, line: str) -> None:
    command = [sys.executable, PROGRAM, str(tmp_path / "x"), way]
    script = f"""
import sys
from burnish.pipeline.launching import launch
sys.exit(launch({command!r}, processes=2, threads=1))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip() == line
    assert done.returncode == code


def test_rows_are_divided_by_tokens_and_none_is_lost() -> None:
    rows = sorted(ranks_program.rows_of_step(0) + ranks_program.rows_of_step(1), key=lambda row: -len(row.tokens))
    parts = [Ranks(rank=rank, world_size=3).split(rows) for rank in range(3)]
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    loads = [sum(len(row.tokens) for row in part) for part in parts]
    assert max(loads) - min(loads) <= max(len(row.tokens) for row in rows)
    assert [len(Ranks(rank=rank, world_size=3).split(rows[:2])) for rank in range(3)] == [1, 1, 0]
    assert single().split(rows) == rows


def test_single_process_changes_nothing() -> None:
    ranks = single()
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    ranks.last_backward([weight])
    ranks.reduce_gradients([weight])
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]
    assert ranks.sum_labels(7) == 7
    assert ranks.most(3) == 3
    assert ranks.is_main
    norm = ranks.gradient_norm([weight])
    ranks.clip([weight], norm=norm, limit=1.0)
    assert weight.grad.norm() == pytest.approx(1.0, rel=1e-5)


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sharding zero3 needs several processes"), joined(sharding="zero3"):
        pass
    weight = nn.Parameter(torch.ones(3, 3))
    for name in ("adafactor", "adamw-8bit"):
        config = TrainConfig(optimizer=name, sharding="zero2")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="cannot update parts of a matrix"):
            make_sharded_optimizer([weight], config, Ranks(rank=0, world_size=2, sharding="zero2"))
    with pytest.raises(ConfigError, match="at least 2"):
        launch(["true"], processes=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="more processes than cards"):
        local_device("cuda")
    with pytest.raises(ConfigError, match="cannot share one card"):
        local_device("cuda:0")
