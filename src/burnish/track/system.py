"""Readings of the machine while a run lasts: processor, memory, cards; under the names that MLflow's page groups."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import psutil

_MIB = 1 << 20


class SystemReader:
    """Reads the machine and this process.

    "megabytes" are of 2^20 bytes. What cannot be read is left out.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cards = _Cards.open()
        psutil.cpu_percent()  # the first reading has nothing to compare with
        self._process.cpu_percent()

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        memory = psutil.virtual_memory()
        figures = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / _MIB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / _MIB,
        }
        if self._cards is not None:
            figures |= self._cards.read()
        return figures

    def close(self) -> None:
        """Let go of the cards."""
        if self._cards is not None:
            self._cards.close()
            self._cards = None


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Cards:
    """NVIDIA's cards by the driver's own library, which needs no package (NVML's C interface)."""

    def __init__(self, library: Any, handles: list[Any]) -> None:
        self._library, self._handles = library, handles

    @classmethod
    def open(cls) -> _Cards | None:
        """None where there is no driver or no card."""
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2():
                return None
            count = ctypes.c_uint()
            handles = []
            if not library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
                for index in range(count.value):
                    handle = ctypes.c_void_p()
                    if not library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                        handles.append(handle)
            if handles:
                return cls(library, handles)
            library.nvmlShutdown()
        return None

    def read(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            name = f"system/gpu_{index}"
            use, memory, milliwatts = _Utilization(), _Memory(), ctypes.c_uint()
            if not self._library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(use)):
                figures[f"{name}_utilization_percentage"] = float(use.gpu)
            if not self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
                figures[f"{name}_memory_usage_megabytes"] = memory.used / _MIB
                figures[f"{name}_memory_usage_percentage"] = 100 * memory.used / max(1, memory.total)
            if not self._library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)):
                figures[f"{name}_power_usage_watts"] = milliwatts.value / 1e3
        return figures

    def close(self) -> None:
        self._library.nvmlShutdown()
