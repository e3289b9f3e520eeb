"""`burnish serve --ray`: what the options describe, served by Ray."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from burnish._optional import require
from burnish.cli.output import counted, note, print_json
from burnish.errors import ConfigError
from burnish.pipeline.serving import ServedEngine, open_served
from burnish.serve.keys import KeyRing
from burnish.serve.settings import ServeSettings


def serve_with_ray(
    ray: str,
    model: str,
    engine: ServedEngine,
    settings: ServeSettings,
    *,
    name: str | None,
    adapters: Mapping[str, str],
    base: str | None,
    host: str,
    port: int,
    keys: KeyRing | None,
    replicas: int,
    resources: str | None,
    json: bool,
    quiet: bool,
) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        BurnishError: see `open_ray`, `open_served` and `serve_on_ray`.
    """
    from dataclasses import replace

    from burnish.scale.ray_resources import parse_resources
    from burnish.scale.ray_session import AUTO, LOCAL, free_port, open_ray

    if replicas < 1:
        raise ConfigError("replicas is out of range", got=replicas, expected="1 or more")
    if not 0 <= port <= 65535:
        raise ConfigError("the port is out of range", got=port, expected="0..65535")
    reserved = parse_resources(resources, device=engine.device, threads=engine.threads)
    engine = replace(engine, threads=engine.threads or reserved.threads)
    # Replicas run in other folders: paths are made whole, hub ids and bundled names stay.
    name = name or (Path(model).resolve().name if Path(model).is_dir() else None)
    model, base = _whole(model), None if base is None else _whole(base)
    opening = functools.partial(
        open_served,
        model,
        engine,
        name=name,
        adapters={each: _whole(path) for each, path in adapters.items()},
        base=base,
    )
    names = [each.name for each in opening().models]  # what is wrong with them shows here, before anything starts
    require("ray.serve", extra="ray")
    from burnish.serve.ray_replica import ReplicaPlan
    from burnish.serve.ray_serving import RayPlace, serve_on_ray
    from burnish.serve.server import api_url, is_loopback

    if ray == LOCAL:
        note("starting Ray on this machine", quiet=quiet)
    with open_ray(ray, cpus=replicas * reserved.cpus, gpus=replicas * reserved.gpus) as session:
        if session.started and ray == AUTO:
            note("there is no cluster to join; Ray was started on this machine", quiet=quiet)
        if not session.has_node_for(reserved):
            raise ConfigError("no replica fits on any node", got=f"--resources {resources or reserved}")
        if port == 0:
            if session.elsewhere():
                raise ConfigError("a port is chosen on this machine alone", got="--port 0", expected="a number")
            port = free_port(host)
        loopback = is_loopback(host)
        place = RayPlace(
            replicas=replicas,
            actor_options=reserved.actor_options(),
            host=host,
            port=port,
            every_node=not loopback,
        )
        url = api_url(host, port)
        if keys is None and not loopback:
            note("warning: anybody who reaches this address may use the server; give it --api-keys", quiet=quiet)

        def on_ready() -> None:
            if json:
                print_json({"url": url, "models": names, "api_keys": keys is not None, "replicas": replicas})
                sys.stdout.flush()
            served = f"serving {', '.join(names)} at {url} with {counted(replicas, 'replica')}"
            note(f"{served} (Ctrl-C ends it)", quiet=quiet or json)

        plan = ReplicaPlan(open_served=opening, settings=settings, keys=keys)
        return serve_on_ray(session.ray, plan, place, on_ready=on_ready, say=lambda line: note(line, quiet=quiet))


def _whole(path: str) -> str:
    return os.path.realpath(path) if Path(path).exists() else path
