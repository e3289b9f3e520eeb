"""Several processes that train one model: who does which rows, what they add up, and when they stop together.

Each process (a rank) takes some rows of every step; losses and gradients are divided by the labels of the whole step
and summed, so that the update is the one that a single process would make. What else they may divide, `sharding` says
(Rajbhandari et al., 2019, arXiv:1910.02054): "zero1" the optimizer's state (`sharded_optimizer.py`), "zero2" and
"zero3" weights too (`sharded_model.py`). Gradients that are held whole are summed in `gradient_buckets.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from burnish.errors import BurnishError, ConfigError, WorkerError
from burnish.train.batches import TrainingExample
from burnish.train.gradient_buckets import BUCKET_BYTES, GradientBuckets
from burnish.train.lion import local

STORE_FILE = "BURNISH_STORE_FILE"  # where processes of one machine meet; without it, at MASTER_ADDR and MASTER_PORT
_FIRST_ERROR = "burnish/first_error"
_PATIENCE = datetime.timedelta(minutes=30)  # the slowest rank may take that much longer, such as while it evaluates
Row = TypeVar("Row", bound=TrainingExample)


class Ranks:
    """The processes of a run, seen from one of them. Methods that add up or agree have to be called by all.

    Attributes:
        rank: this one's number.
        world_size: how many there are.
        sharding: what they divide, of `config.SHARDINGS`.
        device: where this one computes.
        bucket_bytes: gradients are sent in pieces of about this size.
    """

    def __init__(
        self, *, rank: int, world_size: int, sharding: str = "none", device: torch.device | None = None
    ) -> None:
        self.rank, self.world_size, self.sharding = rank, world_size, sharding
        self.device = device or torch.device("cpu")
        self.bucket_bytes = BUCKET_BYTES
        self._buckets: GradientBuckets | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and tracks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    @property
    def shards_model(self) -> bool:
        """Whether each holds a part of every weight, so that all have to run the same forward passes."""
        return not self.alone and self.sharding in ("zero2", "zero3")

    def seed(self, seed: int) -> int:
        """A seed of this rank's own for dropout and noise; the first rank's is the seed itself."""
        return seed + 7919 * self.rank

    def split(self, rows: Sequence[Row]) -> list[Row]:
        """This rank's rows of a step, in their order: each row in turn goes to whoever has the fewest tokens.

        Every rank finds the same division by itself. With fewer rows than ranks, some get none.
        """
        loads, mine = [0] * self.world_size, []
        for row in rows:
            taker = min(range(self.world_size), key=lambda rank: loads[rank])
            loads[taker] += len(row.tokens)
            if taker == self.rank:
                mine.append(row)
        return mine

    def sum_counts(self, *counts: int) -> list[int]:
        """Each count summed over the ranks."""
        return list(counts) if self.alone else [int(value) for value in self._reduced(counts, dist.ReduceOp.SUM)]

    def sum_labels(self, num_labels: int) -> int:
        """Labels of the whole step."""
        return self.sum_counts(num_labels)[0]

    def most(self, count: int) -> int:
        """The largest count of any rank."""
        return count if self.alone else int(self._reduced([count], dist.ReduceOp.MAX)[0])

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; for everything that one process may see and the others not, such as time."""
        return flag if self.alone else bool(self.most(int(flag)))

    def sum_loss(self, loss: Tensor) -> Tensor:
        """A scalar summed over the ranks."""
        if not self.alone:
            dist.all_reduce(loss)
        return loss

    def last_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Say that the next backward pass is this rank's last of the step: its gradients are sent as they come."""
        if not self.alone and not self.shards_model:
            self._buckets_of(parameters).arm()

    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every parameter's gradient over the ranks, in place; one that some ranks lack counts as zero there."""
        if not self.alone and not self.shards_model:  # a sharded model summed them in its backward pass
            self._buckets_of(parameters).finish()

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Norm of the summed gradients of all parameters, whole or sharded; the same on every rank."""
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if not self.shards_model:
            return norm
        square = norm.square()
        dist.all_reduce(square)
        return square.sqrt()

    def clip(self, parameters: Iterable[nn.Parameter], *, norm: Tensor, limit: float) -> None:
        """Scale all gradients by limit / norm where the norm is larger, in place."""
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type == "cpu" and factor == 1:
            return  # Reading the factor costs nothing there; on a card the host would wait.
        torch._foreach_mul_(grads, factor.to(grads[0].device))  # type: ignore[reportPrivateImportUsage]

    def full(self, tensor: Tensor) -> Tensor | None:
        """A sharded tensor whole, on the CPU of the main rank and None elsewhere; any other tensor itself."""
        if not hasattr(tensor, "full_tensor"):
            return tensor.detach()
        whole = tensor.detach().full_tensor()  # type: ignore[operator]
        return whole.cpu() if self.is_main else None

    def full_parameters(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Trained parameters whole, one after the other; empty but on the main rank."""
        whole = {name: self.full(parameter) for name, parameter in parameters.items()}
        return {name: value for name, value in whole.items() if value is not None} if self.is_main else {}

    def barrier(self) -> None:
        """Wait for all."""
        self.sum_counts(0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs the block before the others, which find what it wrote."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def _reduced(self, counts: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[float]:
        values = torch.tensor(counts, dtype=torch.int64, device=self.device)
        dist.all_reduce(values, op=operation)
        return values.tolist()

    def _buckets_of(self, parameters: Sequence[nn.Parameter]) -> GradientBuckets:
        if self._buckets is None or not self._buckets.holds(parameters):
            if self._buckets is not None:
                self._buckets.remove()
            self._buckets = GradientBuckets(parameters, bucket_bytes=self.bucket_bytes)
        return self._buckets


def part_like(value: Any, parameter: Tensor) -> Any:
    """This rank's rows of a whole tensor, if `parameter` is sharded and of its shape; anything else itself."""
    if not isinstance(value, Tensor) or not hasattr(parameter, "to_local") or value.shape != parameter.shape:
        return value
    rows, ranks, rank = len(value), parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()  # type: ignore[attr-defined]
    size = -(-rows // ranks)
    return value[min(rows, rank * size) : min(rows, (rank + 1) * size)].clone()


def single() -> Ranks:
    """The only process."""
    return Ranks(rank=0, world_size=1)


def launched() -> bool:
    """Whether this process is one of several, as torchrun and `launching.launch` start them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: str) -> str:
    """The device of this process: the n-th card for the n-th process of a machine.

    Raises:
        ConfigError: a card is named, or there are fewer cards than processes.
    """
    if not launched() or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ConfigError("several processes cannot share one card", got=device, expected="--device cuda")
    place, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= cards:
        raise ConfigError(
            "there are more processes than cards", got=f"{place + 1} or more", expected=f"at most {cards}"
        )
    return f"cuda:{place}"


def local_threads() -> int:
    """CPU threads of this process when none are asked for: its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))


@contextlib.contextmanager
def joined(*, sharding: str = "none", device: str = "cpu", processes: int = 1) -> Iterator[Ranks]:
    """Meet the other processes, and part from them afterwards; `single()` where there are none.

    An error inside the block ends all: the rank that failed first raises it, and whoever fails because of that exits
    quietly with the same code.

    Args:
        sharding: what they divide.
        device: of this process.
        processes: how many were asked for; 1 where nothing was said.

    Raises:
        ConfigError: sharding without other processes, or another number of them.
        BurnishError: the others were not found.
        WorkerError: another process was killed.
    """
    if not launched():
        if sharding != "none":
            raise ConfigError(
                f"sharding {sharding} needs several processes", remedy="Add --processes 2, or use torchrun."
            )
        yield single()
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if processes not in (1, world_size):
        raise ConfigError("another number of processes was launched", got=world_size, expected=processes)
    place = torch.device(device)
    try:
        store = _store(rank, world_size)
    except (RuntimeError, ValueError, OSError) as error:
        raise BurnishError(f"rank {rank} could not meet the other processes", got=error) from error
    try:
        _start(store, rank, world_size, place)
        yield Ranks(rank=rank, world_size=world_size, sharding=sharding, device=place)
    except Exception as error:
        if not _is_first(store, rank, error):
            raise SystemExit(_first_code(store)) from None
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise WorkerError(
                f"rank {rank} lost the other processes; one of them was killed, or ran out of memory"
            ) from error
        raise
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _store(rank: int, world_size: int) -> Any:
    path = os.environ.get(STORE_FILE)
    if path is not None:
        return dist.FileStore(path, world_size)  # type: ignore[reportPrivateImportUsage]
    store, _, _ = next(rendezvous("env://", rank, world_size))
    return distributed_c10d.PrefixStore("burnish", store)


def _start(store: Any, rank: int, world_size: int, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_PATIENCE)
    dist.barrier()


def _is_first(store: Any, rank: int, error: Exception) -> bool:
    """Put this error on record unless another one is; whether it is the one to show."""
    code = error.exit_code if isinstance(error, BurnishError) else 1
    try:
        return store.compare_set(_FIRST_ERROR, "", f"{rank} {code}").decode().split()[0] == str(rank)
    except Exception:
        return rank == 0  # the store went down with the rank that held it, which is the main one


def _first_code(store: Any) -> int:
    with contextlib.suppress(Exception):
        return int(store.get(_FIRST_ERROR).decode().split()[1])
    return 1
