"""What this machine is: processor, cores and memory that this process may use, instruction sets, NVIDIA cards.

Found in /proc, cgroups and nvidia-smi, without torch. Limits of a container count, not those of its host.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from burnish.plan.devices import DEVICES, MIB, Device

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63

# As Linux lists them -> as people know them, in the order they are shown.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "avx_vnni": "AVX-VNNI",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}

# Estimates for the roofline of a processor nobody measured. One core cannot draw a socket's whole bandwidth, and a
# socket does not grow with its cores for ever.
CORE_BANDWIDTH = 25e9  # bytes/s
SOCKET_BANDWIDTH = 200e9
DEFAULT_CLOCK_HZ = 2.5e9
# Operations per core and cycle: two fused multiply-adds per cycle over the vector's width.
VECTOR_OPS = {"avx512f": 64, "avx2": 32, "asimd": 16}
SCALAR_OPS = 8
# Times the float32 rate. AMX's nominal factors are 16 and 32; large products reach about this much of them.
BF16_GAIN = {"amx_bf16": 3.0, "avx512_bf16": 2.0, "bf16": 2.0}
INT8_GAIN = {"amx_int8": 6.0, "avx512_vnni": 4.0, "avx_vnni": 4.0, "i8mm": 4.0, "asimddp": 4.0}


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The CPU as this process may use it.

    Attributes:
        name: as the system calls it.
        cores: how many this process may run on at once (affinity and cgroup quota).
        clock_hz: current or nominal clock; None when unknown.
        flags: the kernel's names of its features.
        memory_bytes: RAM, or the container's limit where that is lower.
        available_bytes: what of it is free now, or can be freed.
    """

    name: str
    cores: int
    clock_hz: float | None
    flags: frozenset[str]
    memory_bytes: int
    available_bytes: int

    @property
    def instruction_sets(self) -> list[str]:
        """Names for people of the sets that matter to matrix products."""
        return [label for flag, label in INSTRUCTION_SETS.items() if flag in self.flags]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One NVIDIA card as nvidia-smi reports it."""

    name: str
    memory_bytes: int
    driver: str


def processor() -> Processor:
    """This machine's processor and memory as they are now."""
    info = _read(Path("/proc/cpuinfo")) or ""
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)
    memory = psutil.virtual_memory()
    limit, used = container_memory()
    available = memory.available if limit is None else min(memory.available, max(0, limit - used))
    return Processor(
        name=" ".join(name.group(1).split()) if name else platform.processor() or platform.machine(),
        cores=usable_cores(),
        clock_hz=float(clock.group(1)) * 1e6 if clock else None,
        flags=frozenset(flags.group(1).split()) if flags else frozenset(),
        memory_bytes=memory.total if limit is None else min(memory.total, limit),
        available_bytes=available,
    )


def usable_cores(*, root: Path = _CGROUPS) -> int:
    """Cores this process may keep busy: its affinity, less where a cgroup's CPU quota is smaller; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def container_memory(*, root: Path = _CGROUPS) -> tuple[int | None, int]:
    """The lowest memory limit of the cgroups this process is in (None without one), and the bytes used under it."""
    lowest, used = None, 0
    for folder, limit_name, used_name in _memory_folders(root):
        limit = _number(folder / limit_name)
        if limit is not None and limit < _UNLIMITED and (lowest is None or limit < lowest):
            lowest, used = limit, _number(folder / used_name) or 0
    return lowest, used


@functools.cache
def cards() -> tuple[Card, ...]:
    """NVIDIA cards that nvidia-smi lists; none where the program is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(parse_cards(result.stdout))


def parse_cards(listing: str) -> Iterator[Card]:
    """Cards from nvidia-smi's CSV lines (name, MiB, driver); lines it cannot read are passed over."""
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[1].isdigit():
            yield Card(name=parts[0], memory_bytes=int(parts[1]) * MIB, driver=parts[2])


def this_machine() -> Device:
    """This machine's processor as a device; its rates and bandwidth are estimates from its kind, not measurements."""
    found = processor()
    per_cycle = next((ops for flag, ops in VECTOR_OPS.items() if flag in found.flags), SCALAR_OPS)
    fp32 = found.cores * (found.clock_hz or DEFAULT_CLOCK_HZ) * per_cycle
    bf16 = max((gain for flag, gain in BF16_GAIN.items() if flag in found.flags), default=None)
    int8 = max((gain for flag, gain in INT8_GAIN.items() if flag in found.flags), default=None)
    return Device(
        name="cpu",
        title=f"{found.name}, {found.cores} core{'s' if found.cores != 1 else ''}",
        kind="cpu",
        memory_bytes=found.memory_bytes,
        bandwidth=min(found.cores * CORE_BANDWIDTH, SOCKET_BANDWIDTH),
        fp32=fp32,
        fp16=None,
        bf16=None if bf16 is None else fp32 * bf16,
        int8=None if int8 is None else fp32 * int8,
        bfloat16=bf16 is not None,
        source="estimated from cores, clock and instruction sets",
    )


def this_card() -> Device | None:
    """The first NVIDIA card here: its catalogue entry with the memory it really has, or a bare record; None without."""
    found = cards()
    if not found:
        return None
    card = found[0]
    key = re.sub(r"[^a-z0-9]", "", card.name.lower())
    for device in DEVICES.values():
        model = device.name.split("-")[1] if device.name.startswith("rtx") else device.name.split("-")[0]
        if model in key and abs(device.memory_bytes - card.memory_bytes) < 0.1 * device.memory_bytes:
            return device
    return Device(
        name="cuda",
        title=card.name,
        kind="cuda",
        memory_bytes=card.memory_bytes,
        bandwidth=None,
        fp32=None,
        fp16=None,
        bf16=None,
        int8=None,
        bfloat16=False,
        source="nvidia-smi; not in the catalogue, so no rates",
    )


def _cpu_quota(root: Path) -> float | None:
    unified = _read(root / "cpu.max")
    if unified is not None:
        quota, _, period = unified.partition(" ")
        return None if quota.strip() == "max" else int(quota) / int(period or 100_000)
    limit, period = _number(root / "cpu/cpu.cfs_quota_us"), _number(root / "cpu/cpu.cfs_period_us")
    return limit / period if limit and period and limit > 0 else None


def _memory_folders(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Folders of the cgroups this process is in, leaf and root, with the names of their limit and usage files."""
    v1, v2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        leaf = path.lstrip("/")
        if "memory" in controllers.split(","):
            yield (root / "memory" / leaf, *v1)
        elif not controllers:
            yield (root / leaf, *v2)
    yield (root / "memory", *v1)
    yield (root, *v2)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None
