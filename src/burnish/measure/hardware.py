"""What a figure was measured on: processor, instruction sets, memory and versions. Torch-free."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_INSTRUCTION_SETS = {  # names as Linux lists them -> names as people know them
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx_vnni": "AVX-VNNI",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
}
_PACKAGES = ("burnish", "torch", "numpy", "safetensors", "tokenizers", "transformers", "peft")


def hardware_record() -> dict[str, Any]:
    """This machine: cpu, cores, memory_bytes, instruction_sets, os. Nothing here names the machine or its user."""
    name, flags = _processor()
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_sets": [label for flag, label in _INSTRUCTION_SETS.items() if flag in flags],
        "os": f"{platform.system()} {platform.machine()}",
    }


def version_record() -> dict[str, str]:
    """Python and the packages that decide a figure, as far as they are installed."""
    found = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        " ".join(name.group(1).split()) if name else platform.machine(),
        set(flags.group(1).split()) if flags else set(),
    )
