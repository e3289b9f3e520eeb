"""`burnish queue work --ray`: the fleet that the options describe, and what people see of it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.cli.output import counted, note, print_json, watching
from burnish.errors import ConfigError
from burnish.scale.database import parse_url
from burnish.scale.opening import MIN_LEASE_S, QueueAddress


@dataclass(frozen=True, kw_only=True)
class QueueEngine:
    """What a worker's engine is, to be made on the worker's node.

    Attributes:
        source, options: fields of `Source` and `EngineOptions`.
    """

    model: str
    adapter: str | None
    slots: int
    source: Mapping[str, Any]
    options: Mapping[str, Any]

    def __call__(self, threads: int) -> Any:
        """Make it, with so many threads where the source says nothing of them."""
        from burnish.pipeline.opening import EngineOptions, Source, open_engine

        asked = self.source.get("threads")
        source = Source(**{**self.source, "threads": threads if asked is None else asked})
        options = EngineOptions(**self.options)
        return open_engine(self.model, source, adapter=self.adapter, max_num_seqs=self.slots, options=options)


@dataclass(frozen=True)
class RayWish:
    """The options that only Ray has, as they were given."""

    ray: str
    workers: int
    min_workers: int | None
    max_workers: int | None
    resources: str | None
    shrink_after: float | None


def work_on_ray(
    wish: RayWish,
    address: QueueAddress,
    engine: QueueEngine,
    *,
    model: str,
    lease_s: float,
    until_empty: bool,
    json: bool,
    quiet: bool,
    stopping: Callable[..., AbstractContextManager[None]],
) -> int | None:
    """Work; returns the exit code.

    Args:
        stopping: drains the fleet at the first signal and ends it at the second, for the time of a block.

    Raises:
        BurnishError: see `open_ray` and `Fleet.run`.
    """
    from burnish.scale.ray_fleet import Fleet
    from burnish.scale.ray_resources import parse_resources
    from burnish.scale.ray_scaling import ScalingRule
    from burnish.scale.ray_session import AUTO, LOCAL, explain_local_only, open_ray
    from burnish.scale.ray_shards import Shards
    from burnish.scale.ray_worker import WorkerTask
    from burnish.scale.worker_settings import WorkerSettings

    if lease_s < MIN_LEASE_S:
        raise ConfigError("lease is out of range", got=lease_s, expected=f"{MIN_LEASE_S:g} seconds or more")
    resources = parse_resources(wish.resources, device=engine.source["device"], threads=engine.source["threads"])
    shards = Shards(
        tensor_parallel=engine.options["tensor_parallel"],
        pipeline_parallel=engine.options["pipeline_parallel"],
        resources=resources,
        device=engine.source["device"],
    )
    least, most = _limits(wish)
    items = WorkerSettings(queue=address.queue, name="rule", model=model, slots=engine.slots).prefetch
    shrink_s = 30.0 if wish.shrink_after is None else wish.shrink_after
    rule = ScalingRule(least=least, most=most, items_per_worker=items, shrink_after_s=shrink_s)
    address, what = _as_seen_from_nodes(address)
    if wish.ray == LOCAL:
        note("starting Ray on this machine", quiet=quiet)
    with (
        open_ray(
            wish.ray, cpus=most * shards.ranks * resources.cpus, gpus=most * shards.ranks * resources.gpus
        ) as session,
        watching(quiet=quiet) as progress,
    ):
        if session.started and wish.ray == AUTO:
            note("there is no cluster to join; Ray was started on this machine", quiet=quiet)
        unreachable = explain_local_only(what, session) if what is not None else None
        if unreachable is not None:
            raise unreachable
        if not session.has_node_for(resources):
            if session.started:
                raise ConfigError("no worker fits on this machine", got=f"--resources {wish.resources}")
            note(f"no node has {resources} now; waiting for one", quiet=quiet)
        fleet = Fleet(
            session=session,
            task=WorkerTask(
                address=address,
                open_engine=engine,
                model=model,
                slots=engine.slots,
                threads=resources.threads,
                lease_s=lease_s,
                until_empty=until_empty,
                host=socket.gethostname() if what is not None else None,
                shards=shards if shards.ranks > 1 else None,
            ),
            resources=resources,
            rule=rule,
            start=min(max(wish.workers, least), most),
            say=progress.say,
        )
        with stopping(fleet, quiet=quiet):
            workers = counted(fleet.start, "worker") if least == most else f"{least} to {counted(most, 'worker')}"
            note(f"working on queue {address.queue} with {workers} on Ray at {session.address}", quiet=quiet)
            report = fleet.run()
    if json:
        print_json(report)
    else:
        failed = f", {report.errors} of them errors" if report.errors else ""
        done = counted(report.done + report.errors, "item")
        note(f"{done} in {report.seconds:.1f} s{failed}, {report.output_tokens} tokens", quiet=quiet)
    return report.exit_code or None


def _limits(wish: RayWish) -> tuple[int, int]:
    least = wish.workers if wish.min_workers is None and wish.max_workers is None else wish.min_workers
    least = 1 if least is None else least
    most = max(wish.workers, least) if wish.max_workers is None else wish.max_workers
    if wish.workers > most:
        raise ConfigError("--workers is above --max-workers", got=f"{wish.workers} and {most}")
    if least == most and wish.shrink_after is not None:
        raise ConfigError("--shrink-after goes with --min-workers or --max-workers", got=wish.shrink_after)
    return least, most


def _as_seen_from_nodes(address: QueueAddress) -> tuple[QueueAddress, str | None]:
    """The address with whole paths, and in words what of it is reached from this machine alone."""
    url = parse_url(address.store)
    if url.drivername.startswith("sqlite"):
        file = Path(str(url.database)).expanduser().absolute()
        return QueueAddress(
            store=f"sqlite:///{file}", broker=address.broker, queue=address.queue
        ), f"the queue's file {file}"
    if _is_here(url.host):
        return address, f"the queue's database at {url.host}"
    if address.broker is not None:
        from urllib.parse import urlsplit

        host = urlsplit(address.broker).hostname
        if _is_here(host):
            return address, f"the broker at {host}"
    return address, None


def _is_here(host: str | None) -> bool:
    return host is None or host == "localhost" or host.startswith("127.") or host == "::1"


def absolute(path: str | None) -> str | None:
    """A folder's whole path, as workers run elsewhere; hub ids and bundled names stay."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
