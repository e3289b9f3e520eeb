"""Serving on a Ray cluster: replicas of the server behind Ray Serve's proxies, watched and ended from here."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from burnish import errors
from burnish.errors import BurnishError, ConfigError, WorkerError
from burnish.serve.admission import answers
from burnish.serve.ray_front import Desk, Front, FrontState, Phase
from burnish.serve.ray_replica import FRONT, FRONT_APP, Gateway, Replica, ReplicaPlan

REPLICAS_APP = "burnish"
_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
_LOOK_S = 0.25
_CALL_S = 30.0
_FLUSH_S = 0.5
_SPARE_REQUESTS = 64


@dataclass(frozen=True, kw_only=True)
class RayPlace:
    """Where and how often a plan is served.

    Attributes:
        actor_options: what each replica reserves, as Ray names it.
        host, port: where Ray Serve's proxies listen.
        every_node: a proxy on each node with a replica, instead of one on the head node.
    """

    replicas: int
    actor_options: dict[str, Any]
    host: str
    port: int
    every_node: bool


def serve_on_ray(
    ray: Any, plan: ReplicaPlan, place: RayPlace, *, on_ready: Callable[[], None], say: Callable[[str], None]
) -> int:
    """Serve until a signal ends it; returns the exit code: 0, or 130 where a second signal cut requests off.

    Args:
        ray: the module, connected to the cluster.
        on_ready: called once, when every replica takes requests.

    Raises:
        BurnishError: the engine could not be made, or Ray Serve could not be started.
    """
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if _runs_already(ray):
        raise ConfigError(
            "Ray Serve runs already on this cluster", remedy="End it with: serve shutdown; or use another cluster."
        )
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    signals = _Signals()
    with signals:
        try:
            serve.start(
                proxy_location="EveryNode" if place.every_node else "HeadOnly",
                http_options={"host": place.host, "port": place.port},
                logging_config=quiet,
            )
            front = _deploy(serve, plan, place, quiet)
            return _watch(serve, front, place, plan.settings.grace_s, signals, on_ready=on_ready, say=say)
        except BurnishError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise WorkerError("Ray Serve failed", got=f"{type(error).__name__}: {said[:300]}") from error
        finally:
            serve.shutdown()


def _runs_already(ray: Any) -> bool:
    try:
        ray.get_actor(_CONTROLLER[0], namespace=_CONTROLLER[1])
    except ValueError:
        return False
    return True


def _deploy(serve: Any, plan: ReplicaPlan, place: RayPlace, quiet: dict[str, Any]) -> Any:
    """Put both applications on the cluster; returns the front's handle."""
    settings = plan.settings
    desk = Desk(wanted=place.replicas, keys=plan.keys)
    front = serve.deployment(
        serve.ingress(desk)(Front),
        name=FRONT,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
    )
    handle = serve.run(front.bind(), name=FRONT_APP, route_prefix="/")
    replica = serve.deployment(
        serve.ingress(Gateway(plan))(Replica),
        name="Replica",
        num_replicas=place.replicas,
        # The replica's own admission decides who waits; what it turns away needs room to be told so.
        max_ongoing_requests=settings.max_running + settings.max_queue + _SPARE_REQUESTS,
        ray_actor_options=place.actor_options,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5.0,
        logging_config=quiet,
    )
    target = serve.RunTarget(replica.bind(), name=REPLICAS_APP, route_prefix="/v1")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    return handle


def _watch(
    serve: Any,
    front: Any,
    place: RayPlace,
    grace_s: float,
    signals: _Signals,
    *,
    on_ready: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    announced, told = False, 0
    while not signals.count:
        state = _state(front)
        if not announced:
            _raise_refusal(serve, state)
            if state.ready >= place.replicas:
                announced, told = True, state.ready
                on_ready()
        elif state.ready != told:
            told = state.ready
            say(f"{told} of {place.replicas} replicas take requests")
        time.sleep(_LOOK_S)
    _call(front, "drain")
    held = _state(front).held
    say(f"no new requests; {answers(held)} may end within {grace_s:g} s. A second signal ends at once.")
    ends_s = time.monotonic() + grace_s
    while signals.count < 2 and time.monotonic() < ends_s:
        state = _state(front)
        if not state.held and state.ending == state.known:
            time.sleep(_FLUSH_S)  # the last pieces are on their way through the proxy
            return 0
        time.sleep(_LOOK_S)
    say(f"{answers(_state(front).held)} cut off")
    _call(front, "cut")
    time.sleep(2 * _FLUSH_S)
    return 130 if signals.count > 1 else 0


def _state(front: Any) -> FrontState:
    return front.state.remote().result(timeout_s=_CALL_S)


def _call(front: Any, phase: Phase) -> None:
    front.enter.remote(phase).result(timeout_s=_CALL_S)


def _raise_refusal(serve: Any, state: FrontState) -> None:
    """Raise what kept a replica from starting."""
    if state.refusal is not None:
        raise getattr(errors, state.refusal.kind, WorkerError)(state.refusal.message)
    application = serve.status().applications.get(REPLICAS_APP)
    if application is not None and application.status == "DEPLOY_FAILED":
        said = " ".join(str(application.message).split())
        raise WorkerError("no replica could be started", got=said[:300])


class _Signals:
    """Counts SIGTERM and SIGINT for the time of a block, instead of what they do otherwise."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self.count += 1
