"""Workers as Ray actors: placed over the nodes, started again when they die, as many as the queue's depth asks for."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sql

from burnish.scale.database import Database
from burnish.scale.opening import WORKER_PATIENCE_S, open_store
from burnish.scale.ray_resources import WorkerResources
from burnish.scale.ray_scaling import Scaler, ScalingRule
from burnish.scale.ray_session import RaySession
from burnish.scale.ray_worker import Ending, News, RayWorker, WorkerTask
from burnish.scale.tables import results

_POLL_S = 0.2
_LOOK_S = 1.0
_CALM_S = 60.0
_LONGEST_PAUSE_S = 30.0
_PATIENT_S = 30.0
# What starting again does not mend: usage, does not fit, an extra is missing.
_FINAL_CODES = (2, 3, 6)


@dataclass(frozen=True, kw_only=True)
class FleetReport:
    """What all workers did together: results stored, by kind; how often one was started again; most at once."""

    done: int
    errors: int
    output_tokens: int
    seconds: float
    restarts: int
    most_workers: int
    exit_code: int


@dataclass(kw_only=True)
class _Place:
    """One worker after the other."""

    number: int
    name: str
    actor: Any = None
    group: Any = None
    running: Any = None
    asked: Any = None
    news: News | None = None
    started_s: float = 0.0
    pause_s: float = 0.0
    again_s: float = 0.0
    attempts: int = 0
    told_waiting: bool = False
    leaving: bool = False
    code: int | None = None

    @property
    def label(self) -> str:
        where = "" if self.news is None else f" ({self.news.host}, pid {self.news.pid})"
        return f"worker {self.number}{where}"


@dataclass(kw_only=True)
class Fleet:
    """Keeps workers running until `drain` is called, or until the queue is empty where the task says so.

    Args:
        task: of every worker.
        resources: that each of them reserves.
        rule: how many there are.
        start: how many there are at the beginning.
        say: told in words what befalls workers.
    """

    session: RaySession
    task: WorkerTask
    resources: WorkerResources
    rule: ScalingRule
    start: int
    say: Callable[[str], None] = lambda text: None
    restarts: int = 0
    most_workers: int = 0
    _name: str = field(default_factory=lambda: f"ray-{uuid.uuid4().hex[:8]}")
    _places: list[_Place] = field(default_factory=list)
    _placed: int = 0
    _draining: bool = False
    _drained: bool = False
    _empty: bool = False
    _code: int = 0

    def run(self) -> FleetReport:
        """Work.

        Raises:
            BurnishError: the queue's database cannot be reached.
        """
        started = time.monotonic()
        scaler = Scaler(self.rule, now=self.start)
        with open_store(self.task.address) as store:
            since_s = store.database.now_s()
            store.database.patience_s = WORKER_PATIENCE_S
            gauge = _Gauge(lambda: store.depth(self.task.address.queue).unfinished)
            if self.rule.least != self.rule.most:
                gauge.start()
            try:
                self._work(scaler, gauge)
            finally:
                gauge.stop()
                for place in self._places:
                    self._end(place)
            done, errors, tokens = _stored(store.database, self._name, since_s)
        return FleetReport(
            done=done,
            errors=errors,
            output_tokens=tokens,
            seconds=time.monotonic() - started,
            restarts=self.restarts,
            most_workers=self.most_workers,
            exit_code=self._code,
        )

    def drain(self) -> None:
        """Let every worker finish what it has begun; none is started again. Callable from a signal handler."""
        self._draining = True

    def kill(self) -> None:
        """Called just before this process ends at once, which ends every actor: they belong to it."""
        self._draining = True
        self.session.forget_files()

    @property
    def workers(self) -> list[News]:
        """Those that were heard of, as they last were."""
        return [place.news for place in self._places if place.news is not None and place.actor is not None]

    def _work(self, scaler: Scaler, gauge: _Gauge) -> None:
        looked_s = 0.0
        while True:
            now_s = time.monotonic()
            if self._draining and not self._drained:
                self._drained = True
                for place in list(self._places):
                    self._leave(place)
            if not (self._draining or self._empty):
                unfinished = gauge.reading()
                if unfinished is not None:
                    scaler.look(unfinished, now_s)
                    working = any(place.actor is not None for place in self._places)
                    self._empty = self.task.until_empty and not unfinished and not working
                self._fit(scaler.workers)
                for place in self._places:
                    self._begin(place, now_s)
            if now_s - looked_s >= _LOOK_S:
                looked_s = now_s
                self._ask(now_s)
            self._look()
            if self._is_over():
                return

    def _is_over(self) -> bool:
        if any(place.actor is not None for place in self._places):
            return False
        if self._draining or self._empty:
            return True
        return bool(self._places) and all(place.code is not None for place in self._places)

    def _fit(self, wanted: int) -> None:
        """Add places, or let the newest workers leave, until there are so many."""
        staying = [place for place in self._places if not place.leaving]
        for _ in range(wanted - len(staying)):
            self._placed += 1
            self._places.append(_Place(number=self._placed, name=f"{self._name}-{self._placed}"))
        for place in reversed(staying[wanted:]):
            self.say(f"{place.label} is one too many and ends")
            self._leave(place)
        self.most_workers = max(self.most_workers, wanted)

    def _begin(self, place: _Place, now_s: float) -> None:
        if place.actor is not None or place.leaving or place.code is not None or now_s < place.again_s:
            return
        place.attempts += 1
        options = self.resources.actor_options()
        made = self.session.ray.remote(RayWorker).options(
            **options, max_restarts=0, max_concurrency=4, scheduling_strategy=self._placing(place)
        )
        place.actor = made.remote(self.task, f"{place.name}-{place.attempts}")
        place.running, place.asked, place.news = place.actor.run.remote(), None, None
        place.started_s, place.told_waiting = now_s, False

    def _placing(self, place: _Place) -> Any:
        """Over the nodes; where an engine has several ranks, a bundle for each, on as few nodes as have them free."""
        shards = self.task.shards
        if shards is None:
            return "SPREAD"
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [self.resources.demand()] * shards.ranks
        place.group = self.session.ray.util.placement_group(bundles, strategy="PACK")
        return PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=0)

    def _leave(self, place: _Place) -> None:
        """Drain a worker; one that is not heard of yet has nothing to finish."""
        place.leaving = True
        if place.actor is None or place.news is None:
            self._end(place)
        else:
            place.actor.drain.remote()

    def _end(self, place: _Place) -> None:
        if place.actor is not None:
            self.session.ray.kill(place.actor)
            place.actor = None
        if place.group is not None:
            self.session.ray.util.remove_placement_group(place.group)
            place.group = None
        if place.leaving and place in self._places:
            self._places = [each for each in self._places if each is not place]

    def _ask(self, now_s: float) -> None:
        """Ask every worker how it is doing; answers are taken when they come."""
        for place in self._places:
            if place.actor is None:
                continue
            if place.asked is None:
                place.asked = place.actor.news.remote()
            if place.leaving:
                place.actor.drain.remote()  # once more does no harm
            if place.news is None and not place.told_waiting and now_s - place.started_s > _PATIENT_S:
                place.told_waiting = True
                self.say(f"{place.label} is not up yet; it needs a node with {self.resources} free")

    def _look(self) -> None:
        """Take in what has come: news and endings."""
        waited = [ref for place in self._places for ref in (place.running, place.asked) if place.actor and ref]
        if not waited:
            time.sleep(_POLL_S)
            return
        came, _ = self.session.ray.wait(waited, num_returns=len(waited), timeout=_POLL_S)
        for place in list(self._places):
            if place.actor is None:
                continue
            if place.asked in came:
                self._take_news(place)
            if place.running in came:
                self._take_ending(place)

    def _take_news(self, place: _Place) -> None:
        try:
            place.news = news = self.session.ray.get(place.asked)
        except self.session.ray.exceptions.RayError:
            news = None  # it died; `running` says so too
        place.asked = None
        for line in news.said if news is not None else ():
            self.say(f"{place.label}: {line}")

    def _take_ending(self, place: _Place) -> None:
        try:
            ending: Ending = self.session.ray.get(place.running)
            why = ending.error
        except self.session.ray.exceptions.RayActorError as error:
            ending, why = Ending(exit_code=1), _reason(error)
        except self.session.ray.exceptions.RayError as error:
            said = " ".join(str(getattr(error, "cause", None) or error).split())
            ending, why = Ending(exit_code=1), said[:300]
        died = why is not None
        if not died:
            self._last_words(place)
            place.code = 0
            self._empty |= self.task.until_empty and not place.leaving
        elif self._draining or place.leaving or ending.exit_code in _FINAL_CODES:
            place.code = ending.exit_code
            self.say(f"{place.label}: {why}")
        else:
            calm = time.monotonic() - place.started_s > _CALM_S
            place.pause_s = 0.0 if calm else min(max(1.0, place.pause_s * 2), _LONGEST_PAUSE_S)
            place.again_s = time.monotonic() + place.pause_s
            self.restarts += 1
            self.say(f"{place.label}: {why}; starting it again")
        if place.code and ending.error is not None:
            self._code = self._code or place.code
        self._end(place)

    def _last_words(self, place: _Place) -> None:
        try:
            place.asked = place.actor.news.remote()
            self.session.ray.wait([place.asked], timeout=2.0)
            self._take_news(place)
        except self.session.ray.exceptions.RayError:
            pass


class _Gauge:
    """Reads the queue's depth in a thread of its own, as a database that is away makes readers wait."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._value: int | None = None
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="burnish-gauge", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reading(self) -> int | None:
        """The last reading; None where there is no new one.

        Raises:
            BurnishError: the database was away for too long.
        """
        if self._error is not None:
            raise self._error
        value, self._value = self._value, None
        return value

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._value = self._read()
            except Exception as error:
                self._error = error
                return
            self._stopped.wait(_LOOK_S)


def _stored(database: Database, fleet: str, since_s: float) -> tuple[int, int, int]:
    """Results of a fleet's workers, those that died among them: answers, errors, tokens of answers."""
    failed = results.c.error.is_not(None)
    query = sql.select(
        sql.func.count(),
        sql.func.count(results.c.error),
        sql.func.sum(sql.case((failed, 0), else_=results.c.output_tokens)),
    ).where(results.c.finished_s >= since_s, results.c.worker.like(f"{fleet}-%"))
    every, errors, tokens = database.read(lambda connection: connection.execute(query).one())
    return int(every) - int(errors), int(errors), int(tokens or 0)


def _reason(error: Any) -> str:
    """Why an actor died, from Ray's paragraphs."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    words = " ".join(" ".join(lines).split())
    if getattr(error, "actor_init_failed", False) and lines:
        return f"it cannot begin: {lines[-1].strip()[:300]}"
    if "its node has died" in words or "its node was" in words:
        return "its node is gone"
    if "running low on memory" in words:
        return "it was ended, as its node runs out of memory"
    return "it died"
