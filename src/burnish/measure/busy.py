"""Whether other programs keep the processor busy, to be found out before threads start that wait for each other.

Torch-free.
"""

from __future__ import annotations

import os
import time

import psutil

LOOK_SECONDS = 0.2
CALM_LOAD = 0.3  # runnable threads per core in the last minute; below it nobody looks closer
SLACK_CORES = 0.5  # cores that others may take before it is said


def busy_cores(seconds: float = LOOK_SECONDS) -> float:
    """How many of this process's cores others keep busy, looked at for so long (this process sleeps)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    before = psutil.cpu_times(percpu=True)
    time.sleep(seconds)
    after = psutil.cpu_times(percpu=True)
    total = 0.0
    for number, (old, new) in enumerate(zip(before, after)):
        if number not in allowed:
            continue
        spent = sum(new) - sum(old)
        idle = new.idle - old.idle + getattr(new, "iowait", 0.0) - getattr(old, "iowait", 0.0)
        total += 1 - idle / spent if spent > 0 else 0.0
    return max(0.0, total)


def busy_warning(threads: int, *, device: str = "cpu") -> str | None:
    """One line where several threads would wait for cores that others use; None where all is well.

    The load average is asked first, which costs nothing; only where it is not low the cores are looked at.

    Args:
        threads: that are about to compute.
        device: that computes; threads matter on "cpu" only.
    """
    if threads < 2 or not device.startswith("cpu") or not hasattr(os, "getloadavg"):
        return None
    if os.getloadavg()[0] < CALM_LOAD * (os.cpu_count() or 1):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = busy_cores()
    if busy + threads <= cores + SLACK_CORES:
        return None
    return (
        f"other programs keep {busy:.1f} of {cores} cores busy: {threads} threads that wait for each other can be many "
        "times slower than one. Use --threads 1, or wait."
    )
