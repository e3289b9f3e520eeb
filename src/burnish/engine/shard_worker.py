"""A follower: `ShardWorker`, and `python -m burnish.engine.shard_worker SETTINGS`, which the driver starts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

import torch

from burnish.engine.shard_backend import Refusal
from burnish.engine.shard_group import ShardGroup, join
from burnish.engine.shard_rank import ShardRank
from burnish.errors import BurnishError, WorkerError

_ANSWERED = ("load", "plan", "make_cache", "memory")
_SILENT = ("forward", "reset")
_PR_SET_PDEATHSIG = 1


class ShardWorker:
    """One follower of a group, for whoever starts processes: this module, torchrun's ranks, a Ray actor.

    Args:
        rank: 1 and up; rank 0 is the process that has the engine.
        tensor_parallel, pipeline_parallel: of the group.
        address: where rank 0 is met; see `shard_group.join`.
        device: where this one computes.
        timeout_s: see `shard_group.join`.

    Raises:
        WorkerError: the others were not found.
    """

    def __init__(
        self,
        *,
        rank: int,
        tensor_parallel: int,
        pipeline_parallel: int,
        address: str,
        device: str = "cpu",
        timeout_s: float | None = None,
        transport: str | None = None,
    ) -> None:
        self.group = join(
            rank=rank,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            address=address,
            device=device,
            timeout_s=timeout_s,
            transport=transport,
        )

    def run(self) -> None:
        """Follow the driver until it lets go.

        Raises:
            WorkerError: the driver, or another rank, is gone.
            Exception: this rank failed; the others were told.
        """
        try:
            follow(self.group)
        except Exception as error:
            if not isinstance(error, WorkerError):
                self.group.report(error)
            raise


def follow(group: ShardGroup) -> None:
    """Do what the driver says, one model after another, until it says "leave"."""
    rank = ShardRank(group)
    while True:
        name, arguments = group.command()
        if name == "leave":
            return
        if name == "close":
            rank = ShardRank(group)
        elif name in _SILENT:
            getattr(rank, name)(*arguments)
        else:
            assert name in _ANSWERED
            with group.at_work():
                answer = _answer(rank, name, arguments)
            group.gather(answer)


def _answer(rank: ShardRank, name: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(rank, name)(*arguments)
    except WorkerError:
        raise
    except BurnishError as error:
        return Refusal(error)


def main(settings: dict[str, Any]) -> int:
    # The driver decides when this process ends; a Ctrl-C in the terminal is for the driver.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(settings.pop("parent"))
    torch.set_num_threads(settings.pop("threads"))
    try:
        ShardWorker(**settings).run()
    except BaseException:
        # The driver says what happened, in one line.
        if os.environ.get("BURNISH_TRACEBACK"):
            traceback.print_exc()
        return 1
    return 0


def _end_with(parent: int) -> None:
    """End when the driver does, however it ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    threading.Thread(target=_wait_for_driver, name="burnish-driver", daemon=True).start()


def _wait_for_driver() -> None:
    with contextlib.suppress(OSError, ValueError):
        while sys.stdin.buffer.read(1):
            pass
    os._exit(1)


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
