"""A Ray cluster for the time of a command: one that is joined, or one that is started here and ends with the command.

What is started here listens on the loopback only, asks everybody for a token that nobody else is told, shows no
dashboard, and keeps its files in a folder of its own. A cluster that is joined is left as it is.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from burnish._optional import require
from burnish.errors import BurnishError, ConfigError, WorkerError
from burnish.scale.ray_resources import WorkerResources

LOCAL = "local"
AUTO = "auto"
_OBJECT_STORE_BYTES = 100 * 2**20
_EXPECTED = "local, auto, HOST:PORT or ray://HOST:PORT"
_STARTS = 3
_PROBE_S = 10.0
_ATTEMPTS = "RAY_gcs_server_port_wait_time_s"
_NO_CLUSTER = "Could not find any running Ray instance"


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """A connection to a cluster.

    Attributes:
        ray: the module, connected.
        started: the cluster was started for this session, on this machine alone.
        folder: of its files, if it was started.
        address: host and port.
    """

    ray: Any
    started: bool
    folder: str | None
    address: str

    def hosts(self) -> set[str]:
        """Names of the machines that the cluster has now."""
        return {str(node["NodeManagerHostname"]) for node in self.ray.nodes() if node["Alive"]}

    def elsewhere(self) -> list[str]:
        """Those of them that are not this one."""
        return sorted(self.hosts() - {socket.gethostname()})

    def has_node_for(self, resources: WorkerResources) -> bool:
        """Whether some node, were it idle, has room for a worker."""
        wanted = resources.demand()
        return any(
            all(node["Resources"].get(name, 0.0) >= amount for name, amount in wanted.items())
            for node in self.ray.nodes()
            if node["Alive"]
        )

    def forget_files(self) -> None:
        """Remove the files of a cluster that was started here; for those that end this process at once."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def open_ray(address: str, *, cpus: float, gpus: float = 0.0) -> Iterator[RaySession]:
    """Join the cluster at an address, or start one.

    Args:
        address: "local" starts one; "auto" joins the one that runs on this machine or that RAY_ADDRESS names, and
            starts one where there is none; HOST:PORT and ray://HOST:PORT join.
        cpus, gpus: what a cluster that is started has to have at least. CPUs are a count that workers are placed by.

    Raises:
        ConfigError: the address is malformed.
        WorkerError: the cluster cannot be reached, or refuses us.
        MissingExtraError: Ray is not installed.
    """
    _check(address)
    before = dict(os.environ)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    require("ray", extra="ray")
    import ray

    if ray.is_initialized():
        raise WorkerError("this process is connected to a Ray cluster already")
    folders: list[str] = []
    try:
        _quieten(ray)
        joined = None if address == LOCAL else _join(ray, address)
        started = joined is None
        if joined is None:
            joined = _start(ray, folders, cpus=cpus, gpus=gpus)
        yield RaySession(ray=ray, started=started, folder=folders[-1] if started else None, address=joined)
    finally:
        ray.shutdown()
        for name in os.environ.keys() - before.keys():
            if name.startswith("RAY_"):
                del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if name.startswith("RAY_")})
        if folders:
            _read_settings_again()
        for folder in folders:
            _end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _check(address: str) -> None:
    if address not in (LOCAL, AUTO) and _place(address) is None:
        raise ConfigError("--ray is malformed", got=repr(address), expected=_EXPECTED)


def _place(address: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT or ray://HOST:PORT."""
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if not sign or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def _join(ray: Any, address: str) -> str | None:
    """Connect; returns the address, or None where "auto" found no cluster."""
    _probe(os.environ.get("RAY_ADDRESS", "") if address == AUTO else address)
    try:
        with _few_attempts():
            context = ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:
        said = " ".join(str(error).split())
        if address == AUTO and _NO_CLUSTER in said and not os.environ.get("RAY_ADDRESS"):
            return None
        remedy = "Is it running, and reachable from here?"
        if "uthenticat" in said or "token" in said.lower():
            remedy = "Put the cluster's token into ~/.ray/auth_token, or name its file with RAY_AUTH_TOKEN_PATH."
        elif "ersion" in said:
            remedy = "Use the same versions of Ray and Python here and there."
        raise WorkerError(f"the Ray cluster {address} cannot be joined", got=said[:300], remedy=remedy) from error
    return str(getattr(context, "address_info", {}).get("address") or address)


def _probe(address: str) -> None:
    """Ask whether anybody listens there: Ray itself would try for a quarter of an hour.

    Raises:
        WorkerError: nobody does.
    """
    place = _place(address)
    if place is None:
        return
    try:
        socket.create_connection(place, _PROBE_S).close()
    except (OSError, UnicodeError) as error:
        got = getattr(error, "strerror", None) or error
        remedy = "Is it running, and reachable from here?"
        raise WorkerError(f"the Ray cluster {address} cannot be joined", got=got, remedy=remedy) from error


@contextmanager
def _few_attempts() -> Iterator[None]:
    """Where something else listens, each of Ray's attempts takes 40 s: two of them instead of twenty."""
    given = os.environ.get(_ATTEMPTS)
    os.environ.setdefault(_ATTEMPTS, "2")
    try:
        yield
    finally:
        if given is None:
            del os.environ[_ATTEMPTS]


def _start(ray: Any, folders: list[str], *, cpus: float, gpus: float) -> str:
    """Start a cluster of one node whose servers listen on the loopback; adds the folder that it keeps its files in."""
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        # Ray's switch for clusters of several machines: without them nodes live at 127.0.0.1.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    _read_settings_again()
    while True:
        folders.append(tempfile.mkdtemp(prefix="burnish-ray-"))
        try:
            context = ray.init(
                LOCAL,
                num_cpus=max(1, os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                _temp_dir=folders[-1],
            )
            break
        except Exception as error:
            said = " ".join(str(error).split())
            ray.shutdown()
            # Ray gives its node 30 s, which is not enough where others use every core.
            if "timed out" not in said or len(folders) >= _STARTS:
                raise WorkerError("Ray cannot be started on this machine", got=said[:300]) from error
            _end_processes(folders[-1])
    address = str(context.address_info["address"])
    if not address.startswith(("127.0.0.1:", "[::1]:")):
        ray.shutdown()
        raise WorkerError(
            "Ray listens on a network", got=address, expected="127.0.0.1", remedy="Start it with: ray start --head"
        )
    if gpus and ray.cluster_resources().get("GPU", 0.0) < gpus:
        raise ConfigError("there are not so many GPUs here", got=f"{gpus:g} for all workers")
    return address


def _quieten(ray: Any) -> None:
    """Ray prints what befalls actors on stdout, where results go; we say it ourselves."""
    module = ray._private.worker
    if hasattr(module, "print_to_stdstream"):
        module.print_to_stdstream = lambda *words, **options: None


def _read_settings_again() -> None:
    """Ray reads some of its variables when it is imported, which may have been before ours were set."""
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:
        named = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        on_linux = sys.platform not in ("darwin", "win32")
        constants.ENABLE_RAY_CLUSTER = on_linux if named is None else named == "1"  # type: ignore[attr-defined]
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _end_processes(folder: str) -> None:
    """End what a start that failed left behind: our own children that were given this folder."""
    ours = [child for child in psutil.Process().children(recursive=True) if _names(child, folder)]
    for child in ours:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(ours, timeout=10)


def _names(process: psutil.Process, folder: str) -> bool:
    with suppress(psutil.Error):
        return any(folder in word for word in process.cmdline())
    return False


def explain_local_only(what: str, session: RaySession) -> BurnishError | None:
    """Why what lies on this machine cannot be used, where the cluster has other machines; None where it has not."""
    others = session.elsewhere()
    if not others:
        return None
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return ConfigError(
        f"{what} is on this machine alone, and the Ray cluster has others: {shown}",
        remedy="Name a server that every node reaches by its host's name.",
    )


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on at this moment.

    Raises:
        ConfigError: the address is none of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
