"""Everything of a run that has to outlive its process, and how it becomes tensors and JSON and comes back.

A step is a function of what stands here and of the data: trained parameters, the optimizer, the random state, and the
number of steps done, from which follow the learning rate (`schedule.rate_factor`) and the rows that come next
(`row_order.RowOrder`). Files are in `checkpoints.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.errors import CheckpointError
from burnish.train.distributed import part_like
from burnish.train.lion import local
from burnish.train.results import EvalRecord, StepRecord


class Stateful(Protocol):
    """Part of a run with a memory of its own: an optimizer, a loss scaler.

    Its state is made of dicts, lists, tuples, tensors, numbers, text, booleans and None, as deep as it likes.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(kw_only=True)
class RunState:
    """How far a run is. Losses are in nats.

    Attributes:
        step: optimizer steps done, skipped ones included; also the position in the schedule and in the data.
        seconds: wall time of all sessions until now.
        bad_in_a_row: steps until now whose loss or gradient was not finite.
        evaluation_due: the evaluation that belongs to `step` has still to be made.
        best_loss, best_step: lowest evaluation loss and where it was.
        gain_loss: evaluation loss of the last real gain (see `stopping.EarlyStopping`).
        without_gain: evaluations since then.
        steps, evals: on record until now.
    """

    step: int = 0
    seconds: float = 0.0
    bad_in_a_row: int = 0
    evaluation_due: bool = False
    best_loss: float | None = None
    best_step: int | None = None
    gain_loss: float | None = None
    without_gain: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment, ready to be written.

    Attributes:
        step: steps done.
        values: plain JSON; where a tensor was, its name stands.
        tensors: by name; the run's own, not copies.
        steps, evals: records, one plain JSON object each.
    """

    step: int
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    steps: list[Any]
    evals: list[Any]

    @property
    def parameters_are_finite(self) -> bool:
        """No trained parameter holds a NaN or an infinity."""
        trained = (tensor for name, tensor in self.tensors.items() if name.startswith(_PARAMETER))
        return all(bool(tensor.isfinite().all()) for tensor in trained)


class SavedTensors(Protocol):
    """The tensors of a snapshot that was read back; each is read when asked for."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


_PARAMETER, _RANDOM, _PART = "parameter.", "random.", "part."
_RECORDS = ("steps", "evals")


def capture(
    state: RunState,
    *,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Stateful],
    device: torch.device,
    whole: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """What a run is at this moment. Nothing is copied: write it before the next step.

    Args:
        parameters: the trained ones by name.
        parts: the run's other memories by name, such as the optimizer.
        device: whose random state counts beside the CPU's.
        whole: the parameters' values, where the parameters themselves are only parts of them.
    """
    values_of: Mapping[str, Tensor] = parameters if whole is None else whole
    tensors: dict[str, Tensor] = {f"{_PARAMETER}{name}": value.detach() for name, value in values_of.items()}
    tensors[f"{_RANDOM}cpu"] = torch.random.get_rng_state()
    if device.type == "cuda":
        tensors[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state(device)
    plain = {item.name: getattr(state, item.name) for item in fields(state) if item.name not in _RECORDS}
    values = {
        "without_gradient": [name for name, value in parameters.items() if value.grad is None],
        "run": to_json(plain, tensors, name="run"),
        "parts": {name: to_json(part.state_dict(), tensors, name=f"{_PART}{name}") for name, part in parts.items()},
    }
    steps = [to_json(asdict(record), tensors, name="step") for record in state.steps]
    evals = [to_json({**asdict(record)}, tensors, name="eval") for record in state.evals]
    return Snapshot(step=state.step, values=values, tensors=tensors, steps=steps, evals=evals)


def restore(
    values: Mapping[str, Any],
    *,
    steps: list[Any],
    evals: list[Any],
    tensors: SavedTensors,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Stateful],
    device: torch.device,
) -> RunState:
    """Undo `capture`: parameters, parts and random states are set in place, the counters are returned.

    Raises:
        CheckpointError: made by a run with other parameters or parts.
    """
    load_parameters(tensors, parameters)
    if set(values["parts"]) != set(parts):
        raise CheckpointError(
            "the checkpoint is of another kind of run", got=sorted(values["parts"]), expected=sorted(parts)
        )
    for name, part in parts.items():
        saved = from_json(values["parts"][name], tensors)
        part.load_state_dict(saved)
        if isinstance(part, torch.optim.Optimizer):
            _keep_dtypes(part, saved)
    without = set(values["without_gradient"])
    for name, parameter in parameters.items():
        # Between steps there are zeros. Without them, a parameter that the next rows do not touch would be left out of
        # an update that its momentum still makes.
        if name in without:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()
    torch.random.set_rng_state(tensors.read(f"{_RANDOM}cpu"))
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors.read(f"{_RANDOM}cuda"), device)
    return RunState(
        **from_json(values["run"], tensors),
        steps=[StepRecord(**from_json(record, tensors)) for record in steps],
        evals=[EvalRecord(**from_json(record, tensors)) for record in evals],
    )


def load_parameters(tensors: SavedTensors, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy a snapshot's trained parameters into `parameters`.

    Raises:
        CheckpointError: other names, shapes or dtypes.
    """
    saved = {name.removeprefix(_PARAMETER) for name in tensors.names() if name.startswith(_PARAMETER)}
    for name in sorted(saved ^ set(parameters)):
        where = "the checkpoint, but not the run" if name in saved else "the run, but not the checkpoint"
        raise CheckpointError(f"{where}, trains {name}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = tensors.read(f"{_PARAMETER}{name}")
            if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
                raise CheckpointError(
                    f"{name} is another one in the checkpoint",
                    got=f"{list(value.shape)} {value.dtype}",
                    expected=f"{list(parameter.shape)} {parameter.dtype}",
                )
            local(parameter).copy_(part_like(value, parameter))


def to_json(value: Any, tensors: dict[str, Tensor], *, name: str) -> Any:
    """Plain JSON from which `from_json` makes the same value again: tuples, keys that are numbers and NaN survive.

    Args:
        tensors: takes the tensors found, under names that begin with `name`.

    Raises:
        TypeError: a kind of value that has no form here.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        pairs = [[key, to_json(item, tensors, name=f"{name}.{key}")] for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$pairs": pairs}
    if isinstance(value, (list, tuple)):
        items = [to_json(item, tensors, name=f"{name}.{place}") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} cannot be kept in a checkpoint: {type(value).__name__}")


def from_json(value: Any, tensors: SavedTensors) -> Any:
    """Undo `to_json`."""
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors.read(value["$tensor"])
    if "$tuple" in value:
        return tuple(from_json(item, tensors) for item in value["$tuple"])
    if "$pairs" in value:
        return {key: from_json(item, tensors) for key, item in value["$pairs"]}
    if "$float" in value:
        return float(value["$float"])
    return {key: from_json(item, tensors) for key, item in value.items()}


def _keep_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Optimizer.load_state_dict casts floating state to its parameter's dtype, which would round or widen it."""
    for parameter, entry in _entries(optimizer, saved):
        for name, value in entry.items():
            held = optimizer.state.get(parameter, {}).get(name)
            if isinstance(value, Tensor) and isinstance(held, Tensor) and held.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(held.device)


def _entries(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
    if not isinstance(saved.get("state"), Mapping):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers):
        entry = saved["state"].get(number)
        if isinstance(entry, Mapping):
            yield parameter, entry
