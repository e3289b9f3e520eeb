"""What a worker reserves on its node, as command lines say it: `cpus=2,gpus=1,memory=8GiB,NAME=1`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from burnish.errors import ConfigError

_EXPECTED = "NAME=NUMBER pairs joined by commas: cpus, gpus, memory, or a resource of the cluster's own"


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """Of one worker, which holds one engine on one device.

    Attributes:
        cpus: CPU cores; Ray counts them and holds nobody to them. The engine has as many threads.
        gpus: 1 where the engine runs on a GPU. Ray shows the worker that card alone.
        memory: bytes that are reserved; None reserves none.
        custom: resources of the cluster's own, by name.
    """

    cpus: float = 1.0
    gpus: int = 0
    memory: int | None = None
    custom: Mapping[str, float] = field(default_factory=dict)

    def demand(self) -> dict[str, float]:
        """By Ray's names, without what is 0."""
        found = {"CPU": self.cpus, "GPU": float(self.gpus), "memory": float(self.memory or 0), **self.custom}
        return {name: amount for name, amount in found.items() if amount}

    def actor_options(self) -> dict[str, Any]:
        """For `ray.remote(...).options`, and Ray Serve's `ray_actor_options`."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.memory is not None:
            options["memory"] = self.memory
        if self.custom:
            options["resources"] = dict(self.custom)
        return options

    @property
    def threads(self) -> int:
        """Threads for these cores."""
        return max(1, math.floor(self.cpus))

    def __str__(self) -> str:
        return ", ".join(f"{name}={amount:g}" for name, amount in self.demand().items()) or "nothing"


def parse_resources(text: str | None, *, device: str, threads: int | None) -> WorkerResources:
    """Read --resources; what it does not name follows from the device and the threads.

    Raises:
        ConfigError: it is malformed, or does not fit the device.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu and device != "cuda":
        raise ConfigError("Ray chooses the card of each worker", got=f"--device {device}", expected="--device cuda")
    given: dict[str, str] = {}
    for part in (text or "").split(",") if text is not None else []:
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name or not value:
            raise ConfigError("--resources is malformed", got=repr(text), expected=_EXPECTED)
        if name in given:
            raise ConfigError(f"--resources names {name} twice", got=repr(text))
        if name in ("CPU", "GPU", "cpu", "gpu", "num_cpus", "num_gpus"):
            raise ConfigError(f"--resources has no {name}", expected="cpus and gpus")
        given[name] = value
    gpus = _number("gpus", given.pop("gpus", "1" if on_gpu else "0"))
    if gpus != (1 if on_gpu else 0):
        expected = "1 with --device cuda" if on_gpu else "0 with --device cpu"
        raise ConfigError("a worker has one engine on one device", got=f"gpus={gpus:g}", expected=f"gpus={expected}")
    memory: str | int | None = given.pop("memory", None)
    if memory is not None:
        from burnish.engine.memory_budget import parse_bytes  # brings torch, so only where it is needed

        memory = parse_bytes(memory, name="--resources: memory")
    return WorkerResources(
        cpus=_number("cpus", given.pop("cpus", str(threads or 1))),
        gpus=int(gpus),
        memory=memory,
        custom={name: _number(name, value) for name, value in given.items()},
    )


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e6 or (number > 1 and number != int(number)):
        expected = "a number of 0 or more, whole above 1"
        raise ConfigError(f"--resources: {name} is not usable", got=text, expected=expected)
    return number
