"""Starting the followers of a group on this machine, and seeing that none outlives its driver. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from burnish.errors import ConfigError, WorkerError

GRACE_S = 5.0
_NOTICE_S = 2.0
_POLL_S = 0.02


class Followers:
    """Ranks 1 and up of a group, each a process of its own.

    They are started and watched by one thread, which lives as long as they do: the system then ends them when this
    process is killed, and they end by themselves when their standard input closes.

    Args:
        settings: of each, for `shard_worker`.

    Raises:
        WorkerError: the system starts no process.
    """

    def __init__(self, settings: Sequence[Mapping[str, object]]) -> None:
        self._settings = list(settings)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_dead: str | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._started = threading.Event()
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._watch, name="burnish-followers", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failed is not None:
            self.close()
            reason = self._failed.strerror or self._failed
            raise WorkerError("the other processes cannot be started", got=reason) from self._failed

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def dead(self) -> str | None:
        """How the first of them ended, in words, if one did."""
        return self._first_dead

    def first_dead(self) -> str | None:
        """As `dead`, waiting a moment for the news."""
        with self._changed:
            self._changed.wait_for(lambda: self._first_dead is not None, _NOTICE_S)
            return self._first_dead

    def close(self) -> None:
        """Wait for them to end, and end those that do not."""
        with self._changed:
            self._closing = True
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(_POLL_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        try:
            for each in self._settings:
                self._processes.append(_start(each))
        except OSError as error:
            self._failed = error
        finally:
            self._started.set()
        while not self._closing and self._first_dead is None and self._processes:
            for process, settings in zip(self._processes, self._settings):
                code = process.poll()
                if code is not None and not self._closing:
                    with self._changed:
                        self._first_dead = f"rank {settings['rank']} {_ending(code)}"
                        self._changed.notify_all()
                    break
            time.sleep(0.1)
        if self._first_dead is not None and not self._closing:
            self._end_others()
        for process in self._processes:
            process.wait()

    def _end_others(self) -> None:
        """One is gone: the others cannot go on, and may be waiting for it."""
        time.sleep(GRACE_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()


def start_followers(
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    address: str,
    device: str,
    threads: int,
    timeout_s: float,
    transport: str | None = None,
) -> Followers:
    """Start ranks 1 and up; rank 0, this process, has to be listening at `address`."""
    return Followers(
        [
            {
                "rank": rank,
                "tensor_parallel": tensor_parallel,
                "pipeline_parallel": pipeline_parallel,
                "address": address,
                "device": device if device == "cpu" or transport == "gloo" else f"cuda:{rank}",
                "threads": threads,
                "timeout_s": timeout_s,
                "transport": transport,
                "parent": os.getpid(),
            }
            for rank in range(1, tensor_parallel * pipeline_parallel)
        ]
    )


def launched_rank() -> int | None:
    """This process's rank where torchrun (or the like) started it as one of several; None otherwise.

    Raises:
        ConfigError: RANK and WORLD_SIZE are not numbers that fit together.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return None
    if not rank.isdecimal() or not size.isdecimal() or int(rank) >= int(size):
        raise ConfigError("RANK and WORLD_SIZE do not fit together", got=f"{rank!r} and {size!r}")
    return int(rank) if int(size) > 1 else None


def check_world(tensor_parallel: int, pipeline_parallel: int) -> None:
    """Make sure that as many processes were launched as are wanted.

    Raises:
        ConfigError: another number.
    """
    launched, wanted = int(os.environ.get("WORLD_SIZE", "1")), tensor_parallel * pipeline_parallel
    if launched != wanted:
        raise ConfigError(
            "another number of processes was launched",
            got=launched,
            expected=f"{wanted}, for tensor_parallel {tensor_parallel} and pipeline_parallel {pipeline_parallel}",
        )


def local_processes(world_size: int) -> int:
    """How many ranks share this machine."""
    return min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def threads_of_each(world_size: int, threads: int | None) -> int:
    """CPU threads of each rank: those asked for, else its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or max(1, cores // local_processes(world_size))


def _start(settings: Mapping[str, object]) -> subprocess.Popen[bytes]:
    search = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "burnish.engine.shard_worker", json.dumps(dict(settings))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**alone, "PYTHONPATH": search, "OMP_NUM_THREADS": str(settings["threads"])},
    )


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    return f"ended with code {code}"
