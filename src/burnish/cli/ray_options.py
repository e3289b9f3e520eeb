"""Options of the commands that may run on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from burnish.errors import ConfigError

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on a Ray cluster: HOST:PORT, ray://HOST:PORT, auto, or local to start one here.",
    ),
]
Resources = Annotated[
    str | None,
    typer.Option(
        "--resources",
        metavar="NAME=N,...",
        help="On Ray: cpus, gpus, memory and others that each worker reserves, such as cpus=2,memory=4GiB.",
    ),
]
MinWorkers = Annotated[int | None, typer.Option("--min-workers", help="On Ray: least workers, by the queue's depth.")]
MaxWorkers = Annotated[int | None, typer.Option("--max-workers", help="On Ray: most workers, by the queue's depth.")]
ShrinkAfter = Annotated[
    float | None,
    typer.Option("--shrink-after", metavar="SECONDS", help="On Ray: workers that are too many for so long end (30)."),
]
Replicas = Annotated[
    int | None, typer.Option("--replicas", help="On Ray: engines that share the requests, placed over the nodes (1).")
]


def refuse_without_ray(**given: object) -> None:
    """Say which option means something with --ray alone.

    Raises:
        ConfigError: one of them was given.
    """
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} goes with --ray", got=value)


def refuse_with_ray(context: typer.Context, *names: str) -> None:
    """Say which option has no effect with --ray.

    Raises:
        ConfigError: one of them was given.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --ray")
