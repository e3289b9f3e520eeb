"""Running one command as several processes of this machine, without torchrun.

The processes meet through a file (`train.distributed.joined`); only the first one's output is shown. How they divide
the work is in `train/distributed.py`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from burnish.errors import ConfigError

GRACE_S = 10.0  # for the others to notice that one has failed, and for those that were told to end
_POLL_S = 0.05


def is_rank() -> bool:
    """Whether this process was launched as one of several, here or by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(command: Sequence[str], *, processes: int, threads: int | None = None) -> int:
    """Run `command` as `processes` ranks and wait; the exit code is that of the first one that failed, or 0.

    When one fails the others are ended. A SIGTERM is passed on; a Ctrl-C reaches them by itself.

    Args:
        command: program and arguments, such as [sys.executable, "-m", "burnish", "tune", ...].
        processes: how many.
        threads: CPU threads of each; its share of the cores when None.

    Raises:
        ConfigError: fewer than two processes.
    """
    if processes < 2:
        raise ConfigError("processes is out of range", got=processes, expected="at least 2")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="burnish-") as folder:
        shared = {
            **os.environ,
            "BURNISH_STORE_FILE": str(Path(folder, "store")),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        shared["OMP_NUM_THREADS"] = str(threads or max(1, cores // processes))
        if sys.platform == "linux":
            shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ranks: list[subprocess.Popen[bytes]] = []
        with _signals_passed_on(ranks):
            try:
                for rank in range(processes):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    output = None if rank == 0 else subprocess.DEVNULL
                    ranks.append(subprocess.Popen(list(command), env={**shared, **own}, stdout=output))
                return _wait(ranks)
            finally:
                _end(ranks)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all are done or one has failed; then the others may end by themselves for a while."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(_POLL_S)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code is not None for code in codes):
            return 0
        time.sleep(_POLL_S)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Nothing outlives the launcher: first asked to end, then made to."""
    for finish in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for rank in ranks:
            if rank.poll() is None:
                finish(rank)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _signals_passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.terminate()

    previous = [(signal.SIGTERM, signal.signal(signal.SIGTERM, terminate))]
    # The terminal sends Ctrl-C to the ranks too, which save and end; the launcher waits for them.
    previous.append((signal.SIGINT, signal.signal(signal.SIGINT, lambda _number, _frame: None)))
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
