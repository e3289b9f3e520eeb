"""A worker: feeds items into a running batch as they come, stores every result, and only then acknowledges.

    broker -> receive -> begin (attempts + 1) -> engine -> commit (exactly one result) -> settle (acknowledge)

Four threads: the caller's steps the engine, one feeds it, one stores results, one renews leases. The engine never waits
for the database or the broker, as more items are begun than it has slots. An object with `run` and `drain` is all that
whoever deploys workers needs to know.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from burnish.engine.outputs import RequestOutput
from burnish.engine.prompts import Prompt
from burnish.engine.sampling import SamplingParams
from burnish.errors import BurnishError, ConfigError, WorkerError
from burnish.scale.answers import outcome_of
from burnish.scale.brokers import Consumer, Delivery
from burnish.scale.holdings import Holdings, Work
from burnish.scale.items import Key, merged_params
from burnish.scale.store import JobStore, Loaded, Outcome
from burnish.scale.tables import DEAD, DONE, ERROR
from burnish.scale.worker_book import write_note
from burnish.scale.worker_settings import WorkerReport, WorkerSettings

_TAKE_S = 0.25
_GATHER_S = 0.03  # results of so long are stored together
_MOST_ENGINE_FAILURES = 8


class SteppedEngine(Protocol):
    """What a worker needs of an engine; `NativeEngine` is one."""

    tokenizer: Any

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int: ...

    def step(self) -> list[RequestOutput]: ...

    def abort(self, request_id: int) -> None: ...


class Worker:
    """Works until `drain` is called, or until the queue is empty where the settings say so.

    Args:
        engine: nobody else may drive it meanwhile.
        consumer: closed when the worker ends.
        progress: called with the number of results stored so far.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        *,
        store: JobStore,
        consumer: Consumer,
        settings: WorkerSettings,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._consumer = consumer
        self._settings = settings
        self._progress = progress
        self._changed = threading.Condition()
        self._held = Holdings(room=settings.room, slots=settings.slots)
        self._begun: deque[Work] = deque()
        self._running: dict[int, Work] = {}
        self._outcomes: list[Outcome] = []
        self._draining = False
        self._fed = False  # nothing more will be begun
        self._answered = False  # the engine is done with everything that was begun
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._engine_failures = 0
        self._done = self._errors = self._dead = self._output_tokens = 0

    def run(self) -> WorkerReport:
        """Work; returns after a drain, or when the queue is empty.

        Raises:
            WorkerError: the engine fails again and again, or has lost one of its processes.
            BurnishError: the database or the broker was away for too long. What was unfinished goes to other workers.
        """
        started = time.monotonic()
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"burnish-{work.__name__.strip('_')}")
            for work in (self._feed, self._store_outcomes, self._beat)
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        ended = False
        try:
            self._drive()
            with self._changed:
                self._answered = True
                self._changed.notify_all()
            threads[1].join()
            ended = self._failure is None
        finally:
            self._stop(threads, ended=ended)
        if self._failure is not None:
            raise self._failure
        return WorkerReport(
            done=self._done,
            errors=self._errors,
            dead=self._dead,
            output_tokens=self._output_tokens,
            seconds=time.monotonic() - started,
        )

    def drain(self) -> None:
        """Begin nothing more, finish what is begun, give back the rest; `run` then returns. Callable from anywhere."""
        self._draining = True  # no lock: signal handlers run in the thread that may hold it

    # The stages of an item, each ending with the item safe in a further place.

    def receive(self, deliveries: Sequence[Delivery]) -> list[Loaded]:
        """What the store knows of items that the broker handed over."""
        loaded = self._store.load([delivery.key for delivery in deliveries])
        missing = {delivery.key for delivery in deliveries} - {one.key for one in loaded}
        if missing:
            raise ConfigError(
                "the broker delivers items that the store does not know",
                got=f"job {min(missing).job_id}",
                remedy="Give --store as it was given to submit.",
            )
        return loaded

    def begin(self, keys: Sequence[Key]) -> None:
        """Count the attempt before it is made."""
        self._store.begin(keys, worker=self._settings.name)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Make results permanent."""
        self._store.commit(outcomes, worker=self._settings.name, model=self._settings.model)

    def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker, after the commit."""
        self._consumer.acknowledge(deliveries)

    # The engine, in the caller's thread.

    def _drive(self) -> None:
        while True:
            with self._changed:
                while not (self._begun or self._running or self._fed or self._failure):
                    self._changed.wait(_TAKE_S)
                if self._failure is not None or (self._fed and not self._begun and not self._running):
                    return
                new, self._begun = self._begun, deque()
            for work in new:
                self._start(work)
            if self._running:
                self._step()

    def _start(self, work: Work) -> None:
        try:
            self._running[self._engine.submit(work.loaded.prompt, work.params)] = work
        except WorkerError:
            raise
        except BurnishError as error:
            self._finish([Outcome(key=work.key, error=error.message)])
        except Exception as error:
            self._finish([Outcome(key=work.key, error=f"{type(error).__name__}: {error}")])

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except WorkerError:
            raise  # one of the engine's processes is gone: no item is at fault, and nothing runs any more
        except Exception as error:
            self._engine_failed(error)
            return
        if not outputs:
            return
        self._engine_failures = 0
        with_tokens = self._engine.tokenizer is None
        finished = []
        for output in outputs:
            work = self._running.pop(output.index)
            finished.append(outcome_of(work.key, output, work.params, with_tokens=with_tokens))
        self._finish(finished)

    def _engine_failed(self, error: Exception) -> None:
        """One of several is at fault, or none: they run alone from here on. One alone is the one."""
        self._engine_failures += 1
        if self._engine_failures > _MOST_ENGINE_FAILURES:
            raise WorkerError("the engine fails again and again", got=error) from error
        for request_id in self._running:
            self._engine.abort(request_id)
        failed, self._running = list(self._running.values()), {}
        if len(failed) == 1:
            said = " ".join(str(error).split())
            self._finish([Outcome(key=failed[0].key, error=f"the engine failed: {type(error).__name__}: {said}")])
            return
        with self._changed:
            self._held.leave([work.key for work in failed])
            for work in failed:
                self._held.add(work, suspect=True)
            self._changed.notify_all()

    def _finish(self, outcomes: list[Outcome]) -> None:
        with self._changed:
            self._held.finish(outcome.key for outcome in outcomes)
            self._outcomes += outcomes
            self._changed.notify_all()

    # The three threads beside it.

    def _feed(self) -> None:
        while not self._draining and self._failure is None:
            with self._changed:
                waiting = self._held.num_waiting
            if waiting < self._settings.room or self._consumer.ready:
                # Waits only while nothing could begin anyway.
                taken = self._consumer.take(self._settings.prefetch, timeout_s=0.0 if waiting else _TAKE_S)
                if taken:
                    self._sort(taken)
                elif not waiting and self._settings.until_empty and self._is_empty():
                    break
            self._begin_some()
        with self._changed:
            given_up = self._held.give_up()
        self._consumer.release(given_up)
        with self._changed:
            self._fed = True
            self._changed.notify_all()

    def _sort(self, taken: Sequence[Delivery]) -> None:
        with self._changed:
            new = self._held.new(taken)
        finished, dead, ready, refused = [], [], [], []
        for loaded in self.receive(new) if new else ():
            if loaded.state in (DONE, ERROR):
                finished.append(loaded.key)
            elif loaded.state == DEAD or loaded.attempts >= loaded.max_attempts:
                dead.append(loaded)
            else:
                try:
                    ready.append(Work(loaded=loaded, params=merged_params(loaded.job_params, loaded.params)))
                except BurnishError as error:
                    refused.append(Outcome(key=loaded.key, error=error.message))
        buried = [loaded.key for loaded in dead if loaded.state != DEAD]
        if buried:
            self._store.bury(buried)
        with self._changed:
            for work in ready:
                self._held.add(work)
            acknowledged = self._held.drop(finished)
            given_up = self._held.drop(loaded.key for loaded in dead)
            self._outcomes += refused
            self._dead += len(buried)
            self._changed.notify_all()
        if acknowledged:
            self._consumer.acknowledge(acknowledged)
        if given_up:
            self._consumer.bury(given_up)

    def _begin_some(self) -> None:
        with self._changed:
            batch = self._held.next_batch()
            if not batch:
                if self._held.num_waiting and not self._draining and self._failure is None:
                    self._changed.wait(_TAKE_S)  # until the engine has room
                return
            lost = [work.key for work in batch if not self._consumer.is_current(self._held.deliveries[work.key])]
            if lost:
                # Delivered to somebody else by now, or again to us.
                self._held.leave(lost)
                self._held.drop(lost)
                batch = [work for work in batch if work.key not in lost]
        if batch:
            self.begin([work.key for work in batch])
            with self._changed:
                self._begun += batch
                self._changed.notify_all()

    def _is_empty(self) -> bool:
        with self._changed:
            if self._held.deliveries:
                return False
        return self._store.depth(self._settings.queue).unfinished == 0

    def _store_outcomes(self) -> None:
        while True:
            with self._changed:
                while not (self._outcomes or self._answered or self._failure):
                    self._changed.wait(_TAKE_S)
                gather = not (self._answered or self._held.alone)
            if gather:
                self._over.wait(_GATHER_S)
            with self._changed:
                outcomes, self._outcomes = self._outcomes, []
                if not outcomes:
                    return
            self.commit(outcomes)
            with self._changed:
                settled = self._held.drop(outcome.key for outcome in outcomes)
                self._changed.notify_all()
            self.settle(settled)
            self._count(outcomes)

    def _count(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.error is None:
                self._done += 1
                self._output_tokens += outcome.output_tokens or 0
            else:
                self._errors += 1
        self._progress(self._done + self._errors)

    def _beat(self) -> None:
        while True:
            self._note("draining" if self._draining else "working")
            if self._over.wait(self._settings.beat_s):
                return
            self._consumer.renew()

    def _note(self, state: str) -> None:
        settings = self._settings
        write_note(
            self._store.database,
            name=settings.name,
            queue=settings.queue,
            model=settings.model,
            state=state,
            running=len(self._held.inside),
            finished=self._done + self._errors,
        )

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _stop(self, threads: list[threading.Thread], *, ended: bool) -> None:
        with self._changed:
            if not ended and self._failure is None:
                self._failure = WorkerError("the worker was stopped")
            self._changed.notify_all()
        self._over.set()
        if not ended:
            self._store.database.stop()
        for thread in threads:
            thread.join(30)
        try:
            self._consumer.close()
            self._note("stopped" if ended else "failed")
        except BurnishError:
            if ended:
                raise
