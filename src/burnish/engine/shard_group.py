"""The processes that run one model together, seen from one of them: how they meet, and what they send each other.

Rank 0 drives, the others follow. Ranks of a stage are consecutive. Three kinds of groups: one for commands, whose
followers wait as long as it takes; one of all ranks and one of the stage for tensors, where whoever waits too long
takes the others for lost. Tensors go by NCCL between GPUs and by gloo otherwise; commands always by gloo.

The groups are objects of their own, not torch.distributed's default group, so that an engine leaves the process's own
distributed state alone and several engines may stand beside each other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from burnish.errors import BurnishError, ConfigError, WorkerError

TIMEOUT_S = 300.0
_FOR_EVER = datetime.timedelta(days=365)
_FIRST_ERROR = "burnish/first_error"
_HERE = "burnish/here/"
_HEAD = 8
_INLINE = 4096
_AT_WORK = -1
_SIGN_S = 1.0


class ShardGroup:
    """One rank of several.

    Args:
        rank: this one's number, 0 .. tensor_parallel * pipeline_parallel - 1.
        store: where they meet; see `join`.
        device: where this rank computes.
        timeout_s: a rank that lets the others wait so long within a step is lost.
        transport: "gloo" or "nccl", for tensors; None goes by the device.
        host: address of this machine that the others reach; None looks it up.
    """

    def __init__(
        self,
        *,
        rank: int,
        tensor_parallel: int,
        pipeline_parallel: int,
        store: Any,
        device: torch.device,
        timeout_s: float = TIMEOUT_S,
        transport: str | None = None,
        host: str | None = None,
    ) -> None:
        self.rank, self.tensor_parallel, self.pipeline_parallel = rank, tensor_parallel, pipeline_parallel
        self.device = device
        self.timeout_s = timeout_s
        self._store = store
        self._host = host
        nccl = (transport or ("nccl" if device.type == "cuda" else "gloo")) == "nccl"
        limit = datetime.timedelta(seconds=timeout_s)
        world = self.world_size
        make = self._nccl if nccl else self._gloo
        # The tensors' group first: it gives up if somebody does not come.
        self._all = make("all", rank, world, limit)
        self._stage = self._all
        if pipeline_parallel > 1:
            stage, place = divmod(rank, tensor_parallel)
            self._stage = make(f"stage{stage}", place, tensor_parallel, limit) if tensor_parallel > 1 else None
        self._control = self._gloo("control", rank, world, _FOR_EVER)
        self._head = torch.zeros(_HEAD + _INLINE, dtype=torch.uint8)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    def command(self, value: Any = None) -> Any:
        """What the driver gives, on every rank; the followers wait for it."""
        with self._losing():
            head = self._head
            if self.is_driver:
                data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
                head[:_HEAD] = _bytes(len(data).to_bytes(_HEAD, "little"))
                if len(data) <= _INLINE:
                    head[_HEAD : _HEAD + len(data)] = _bytes(data)
                # A rank that hangs before it listens again takes nothing; followers may wait for ever, this may not.
                limit = datetime.timedelta(seconds=self.timeout_s)
                self._control.broadcast(head, 0).wait(limit)
                if len(data) > _INLINE:
                    self._control.broadcast(_bytes(data), 0).wait(limit)
                return value
            self._control.broadcast(head, 0).wait()
            size = int.from_bytes(bytes(head[:_HEAD].numpy()), "little")
            body = head[_HEAD : _HEAD + size]
            if size > _INLINE:
                body = torch.empty(size, dtype=torch.uint8)
                self._control.broadcast(body, 0).wait()
            return pickle.loads(body.numpy().tobytes())

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value by rank, at the driver; None elsewhere.

        The driver waits for as long as each rank shows that it lives: by its value, or by `at_work` before.
        """
        data = _bytes(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
        with self._losing():
            if not self.is_driver:
                self._control.send([torch.tensor([len(data)])], 0, 0).wait()
                self._control.send([data], 0, 1).wait()
                return None
            limit = datetime.timedelta(seconds=self.timeout_s)
            values = [value]
            for rank in range(1, self.world_size):
                size = torch.full((1,), _AT_WORK)
                while int(size) == _AT_WORK:
                    self._control.recv([size], rank, 0).wait(limit)
                body = torch.empty(int(size), dtype=torch.uint8)
                self._control.recv([body], rank, 1).wait(limit)
                values.append(pickle.loads(body.numpy().tobytes()))
            return values

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Show the driver, for whom `gather` comes next, that this follower lives, however long the block takes."""
        done = threading.Event()
        sign = threading.Thread(target=self._show_life, args=(done,), name="burnish-at-work", daemon=True)
        sign.start()
        try:
            yield
        except BaseException:
            done.set()  # the driver may not be there to take the last sign
            raise
        done.set()
        sign.join()

    def _show_life(self, done: threading.Event) -> None:
        with contextlib.suppress(RuntimeError):  # that the driver is gone is found out when the answer is sent
            while not done.wait(min(_SIGN_S, self.timeout_s / 4)):
                # Waits until the driver asks, so that there is never more than one on its way.
                self._control.send([torch.tensor([_AT_WORK])], 0, 0).wait()

    def sum_stage(self, x: Tensor) -> Tensor:
        """The sum over the ranks of this stage; `x` may be changed."""
        return x if self.tensor_parallel == 1 else self._reduced(self._stage, x, dist.ReduceOp.SUM)

    def max_stage(self, x: Tensor) -> Tensor:
        """The largest over the ranks of this stage, element by element; `x` may be changed."""
        return x if self.tensor_parallel == 1 else self._reduced(self._stage, x, dist.ReduceOp.MAX)

    def sum_all(self, x: Tensor) -> Tensor:
        """The sum over all ranks; `x` may be changed."""
        return self._reduced(self._all, x, dist.ReduceOp.SUM)

    def share(self, x: Tensor, *, source: int) -> Tensor:
        """What rank `source` has, everywhere; elsewhere `x` says the shape and is filled."""
        x = x.contiguous()
        with self._losing():
            self._all.broadcast(x, source).wait()
        return x

    def send(self, x: Tensor, *, to: int) -> Sent:
        """Begin to send to another rank; the answer is to be kept until it is waited for."""
        x = x.contiguous()
        with self._losing():
            return Sent(x, self._all.send([x], to, 0), self)

    def receive(self, x: Tensor, *, source: int) -> Tensor:
        """Fill `x` with what another rank sends."""
        with self._losing():
            self._all.recv([x], source, 0).wait()
        return x

    def report(self, error: BaseException) -> None:
        """Leave word of why this rank ends, unless another one did before."""
        text = error.message if isinstance(error, BurnishError) else f"{type(error).__name__}: {error}"
        kind = type(error).__name__ if isinstance(error, BurnishError) else "WorkerError"
        with contextlib.suppress(Exception):
            self._store.compare_set(_FIRST_ERROR, "", f"{self.rank}\n{kind}\n{' '.join(text.split())}")

    def reported(self) -> tuple[int, str, str] | None:
        """The rank that ended first, the class of its error and its line; None if none left word."""
        with contextlib.suppress(Exception):
            if self._store.check([_FIRST_ERROR]):
                rank, kind, text = self._store.get(_FIRST_ERROR).decode().split("\n", 2)
                return int(rank), kind, text
        return None

    def _reduced(self, group: Any, x: Tensor, operation: Any) -> Tensor:
        x = x.contiguous()
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        with self._losing():
            group.allreduce([x], options).wait()
        return x

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = f"rank {self.rank} lost the other processes"
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise WorkerError(
                    f"{lost}: one gave no sign for {self.timeout_s:g} s",
                    remedy="Raise BURNISH_SHARD_TIMEOUT (seconds) if it was only slow.",
                ) from error
            raise WorkerError(f"{lost}: one of them ended") from error

    def _gloo(self, name: str, rank: int, size: int, timeout: datetime.timedelta) -> Any:
        kind: Any = dist.ProcessGroupGloo  # type: ignore[attr-defined]
        options = kind._Options()
        options._devices = [
            kind.create_default_device() if self._host is None else kind.create_device(hostname=self._host)
        ]
        options._timeout = timeout
        return kind(self._part_of_store(name), rank, size, options)

    def _nccl(self, name: str, rank: int, size: int, timeout: datetime.timedelta) -> Any:
        kind: Any = dist.ProcessGroupNCCL  # type: ignore[attr-defined]
        options = kind.Options()
        options._timeout = timeout
        return kind(self._part_of_store(name), rank, size, options)

    def _part_of_store(self, name: str) -> Any:
        return distributed_c10d.PrefixStore(f"burnish/{name}", self._store)


class Sent:
    """A tensor on its way; it has to be kept until it has arrived."""

    def __init__(self, tensor: Tensor, work: Any, group: ShardGroup) -> None:
        self._tensor, self._work, self._group = tensor, work, group

    def wait(self) -> None:
        with self._group._losing():
            self._work.wait()


def join(
    *,
    rank: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    address: str,
    device: torch.device | str = "cpu",
    timeout_s: float | None = None,
    transport: str | None = None,
    store: Any = None,
) -> ShardGroup:
    """Meet the other ranks.

    Args:
        address: "tcp://HOST:PORT" of rank 0, which listens there; "file:///PATH" that all can write to; or "env://",
            what torchrun says.
        timeout_s: see `ShardGroup`; None is the variable BURNISH_SHARD_TIMEOUT, or the default.
        store: rank 0's own, where it listens already.

    Raises:
        ConfigError: the address is none.
        WorkerError: the others were not found in time.
    """
    timeout_s = timeout_from_environment() if timeout_s is None else timeout_s
    place = torch.device(device)
    world = tensor_parallel * pipeline_parallel
    if place.type == "cuda":
        torch.cuda.set_device(place)
    parts = urlsplit(address)
    loopback = parts.hostname in ("127.0.0.1", "localhost")
    try:
        meeting = store if store is not None else _store(address, rank, world, timeout_s)
        meeting.set(f"{_HERE}{rank}", "1")
        return ShardGroup(
            rank=rank,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            store=meeting,
            device=place,
            timeout_s=timeout_s,
            transport=transport,
            host="127.0.0.1" if loopback else None,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise WorkerError(f"rank {rank} could not meet the other processes at {address}", got=error) from error


def listen(host: str = "127.0.0.1", *, timeout_s: float = TIMEOUT_S) -> tuple[Any, str]:
    """A store on a free port of this machine, for rank 0, and its address."""
    limit = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, 0, None, True, limit, wait_for_workers=False)  # type: ignore[attr-defined]
    return store, f"tcp://{host}:{store.port}"


def here(store: Any, world_size: int) -> bool:
    """Whether all followers have come to where the ranks meet."""
    return bool(store.check([f"{_HERE}{rank}" for rank in range(1, world_size)]))


def timeout_from_environment() -> float:
    """Seconds after which a rank that gives no sign is lost: BURNISH_SHARD_TIMEOUT, or 300.

    Raises:
        ConfigError: the variable is no number above 0.
    """
    text = os.environ.get("BURNISH_SHARD_TIMEOUT", str(TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError("BURNISH_SHARD_TIMEOUT is not a number of seconds", got=repr(text))
    return seconds


def _store(address: str, rank: int, world: int, timeout_s: float) -> Any:
    limit = datetime.timedelta(seconds=timeout_s)
    parts = urlsplit(address)
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        return dist.TCPStore(parts.hostname, parts.port, None, rank == 0, limit, wait_for_workers=False)  # type: ignore[attr-defined]
    if parts.scheme == "file" and parts.path:
        return dist.FileStore(parts.path, world)  # type: ignore[attr-defined]
    if parts.scheme == "env":
        store, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
        return distributed_c10d.PrefixStore("burnish", store)
    raise ConfigError("not an address to meet at", got=address, expected="tcp://HOST:PORT, file:///PATH or env://")


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
