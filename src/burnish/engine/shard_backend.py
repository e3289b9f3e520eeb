"""The driver's side of a model that several processes run: a `Backend` that tells the followers what to do.

A rank that fails takes the group with it: the next call, and every later one, raises the error that was first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from burnish import errors
from burnish.engine.memory_budget import Demand
from burnish.engine.outputs import RankMemory
from burnish.engine.shard_group import ShardGroup
from burnish.engine.shard_launch import Followers
from burnish.engine.shard_rank import LoadedSizes, PartOptions, ShardRank
from burnish.engine.step import AdapterMatrices, StepInputs
from burnish.errors import BurnishError, ConfigError, WorkerError


class Refusal:
    """A follower's answer to a call that it cannot honour; the group stays as it is."""

    def __init__(self, error: BurnishError) -> None:
        self.kind, self.message = type(error).__name__, error.message


class ShardBackend:
    """See `Backend`; `open` comes before anything else, `make_cache` before `forward`.

    Args:
        group: seen from its driver.
        followers: the other ranks, where they were started here; they end with this backend.
        owned: the group is this backend's alone and ends with it; else it waits for another model.

    Attributes:
        rank: the driver's own part.
        loaded: what each rank read, by rank.
        memory: what each rank takes, by rank.
    """

    name = "torch"

    def __init__(self, group: ShardGroup, *, followers: Followers | None = None, owned: bool = False) -> None:
        self.rank = ShardRank(group)
        self.device: torch.device = group.device
        self.num_blocks = 0
        self.block_size = 1
        self.loaded: tuple[LoadedSizes, ...] = ()
        self.memory: tuple[RankMemory, ...] = ()
        self._group = group
        self._followers = followers
        self._owned = owned
        self._failed: BurnishError | None = None

    @property
    def tensor_parallel(self) -> int:
        return self._group.tensor_parallel

    @property
    def pipeline_parallel(self) -> int:
        return self._group.pipeline_parallel

    @property
    def kv_bytes(self) -> int:
        """Of all ranks together."""
        return sum(each.kv_bytes for each in self.memory)

    @property
    def weights_bytes(self) -> int:
        """Of all ranks together."""
        return sum(each.weights_bytes for each in self.memory)

    @property
    def packed_linears(self) -> int:
        return sum(each.packed_linears for each in self.loaded)

    def load(self, options: PartOptions) -> None:
        """Have every rank read its part; raises as `ShardRank.load`.

        A Ctrl-C ends the loading at once, and with it a group that is this backend's alone.
        """
        self.loaded = tuple(self._asked("load", options, stoppable=self._owned))

    def plan(self, demand: Demand, *, memory: str | int | None, kv_memory: str | int | None) -> tuple[int, int]:
        """Blocks that every rank has room for, and what one takes of all memories; raises as `plan_blocks`."""
        planned = self._asked("plan", demand, memory, kv_memory)
        return min(blocks for blocks, _ in planned), sum(size for _, size in planned)

    def make_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """Have every rank allocate its share of the cache; 0 blocks for none."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.memory = tuple(self._asked("make_cache", num_blocks, block_size, dtype))

    def read_memory(self) -> tuple[RankMemory, ...]:
        """What every rank takes now."""
        return tuple(self._asked("memory"))

    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """See `Backend.forward`.

        Raises:
            WorkerError: a rank died or hangs; the engine is of no use any more.
        """
        with self._together():
            self._group.command(("forward", (step, greedy)))
            out = self.rank.forward(step, greedy)
        assert out is not None
        return out

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """See `Backend.set_adapters`.

        Raises:
            ConfigError: always; parts of adapters are not computed.
        """
        raise no_adapters()

    def reset(self) -> None:
        """See `Backend.reset`; a group that failed has nothing left to forget."""
        if self._failed is None:
            with self._together():
                self._group.command(("reset", ()))
                self.rank.reset()

    def close(self) -> None:
        """Let the followers go: they end, or wait for another model if the group is somebody else's."""
        if self._failed is None:
            self._failed = WorkerError("the engine is closed")
            with contextlib.suppress(BurnishError):
                self._group.command(("leave" if self._owned else "close", ()))
        if self._followers is not None:
            self._followers.close()

    def _asked(self, name: str, *arguments: Any, stoppable: bool = False) -> list[Any]:
        """What every rank answers to a call; the first refusal is raised, the driver's own before others."""
        with self._together(stoppable=stoppable):
            self._group.command((name, arguments))
            try:
                own = getattr(self.rank, name)(*arguments)
            except BurnishError as error:
                if isinstance(error, WorkerError):
                    raise
                own = error
            answers = self._group.gather(own if not isinstance(own, BurnishError) else Refusal(own))
        if isinstance(own, BurnishError):
            raise own
        assert answers is not None
        for answer in answers:
            if isinstance(answer, Refusal):
                raise getattr(errors, answer.kind, WorkerError)(answer.message)
        return answers

    @contextlib.contextmanager
    def _together(self, *, stoppable: bool = False) -> Iterator[None]:
        """What all ranks do at once: it is not left half way, unless `stoppable`, and if it fails all is over."""
        if self._failed is not None:
            raise self._failed
        try:
            with contextlib.nullcontext() if stoppable else uninterrupted():
                yield
        except Exception as error:
            failed = self._explained(error)
            self._end(failed)
            if failed is error:
                raise
            raise failed from error
        except BaseException:
            if stoppable:
                self._end(WorkerError("the engine was interrupted"))
            raise

    def _end(self, error: BurnishError) -> None:
        self._failed = error
        if self._followers is not None:
            self._followers.close()

    def _explained(self, error: Exception) -> BurnishError:
        """The error that was first, in one line."""
        if not isinstance(error, WorkerError):
            if isinstance(error, BurnishError):
                return error
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return WorkerError(f"rank 0 failed: {text}")
        died = None if self._followers is None else self._followers.first_dead()
        reported = self._group.reported()
        if reported is not None:
            rank, kind, text = reported
            return getattr(errors, kind, WorkerError)(f"rank {rank} failed: {text}")
        return error if died is None else WorkerError(died)


def no_adapters() -> ConfigError:
    """The refusal of adapters."""
    return ConfigError(
        "adapters are not served by several processes", remedy="Merge it first: burnish merge ADAPTER --out DIR"
    )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a Ctrl-C wait until the block has ended: ranks that are left in the middle cannot go on together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: asked.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if asked and callable(previous):
        previous(*asked[0])
