"""The memory meter: what a stage's peak was, and which tensors it was made of.

On Linux the kernel itself keeps the high-water mark of the resident set; it is reset at the start where that is
allowed, so that no peak between two samples is lost. Elsewhere a thread samples the resident set. On CUDA the
allocator's own peaks are read as well. Predictions are made in `burnish.plan`, not here.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from burnish.measure.formatting import format_bytes, format_count, format_share
from burnish.models.host_memory import trim_heap

__all__ = [
    "ComponentBytes",
    "DtypeRow",
    "MemoryMeter",
    "MemoryReading",
    "component_bytes",
    "dtype_table",
    "format_bytes",
    "format_count",
    "format_share",
    "module_bytes",
    "release_free_memory",
    "resident_bytes",
    "tensor_bytes",
]

_PROCESS = psutil.Process()
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_SLACK = 16 * 1024**2  # the kernel counts pages per CPU and folds them in late


def resident_bytes() -> int:
    """Bytes of this process that stand in physical memory now, mapped files included."""
    return _PROCESS.memory_info().rss


def release_free_memory() -> None:
    """Collect garbage and hand the allocator's free pages back, so that a start figure holds no leftovers."""
    gc.collect()
    trim_heap()


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """What one meter saw. Bytes of the process; the `cuda_` figures are None without a CUDA device."""

    start_bytes: int
    peak_bytes: int
    end_bytes: int
    seconds: float
    method: str
    """`high-water` (the kernel's mark), or `sampled`."""
    cuda_start_bytes: int | None = None
    cuda_allocated_peak_bytes: int | None = None
    cuda_reserved_peak_bytes: int | None = None

    @property
    def growth_bytes(self) -> int:
        """Peak over start: what the measured block asked for on top of what was there."""
        return max(0, self.peak_bytes - self.start_bytes)

    @property
    def device_peak_bytes(self) -> int:
        """The peak on the device that computes: CUDA's allocated peak where there is one, the process's otherwise."""
        return self.peak_bytes if self.cuda_allocated_peak_bytes is None else self.cuda_allocated_peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """The reading as JSON values, growth included."""
        return {**asdict(self), "growth_bytes": self.growth_bytes}


class MemoryMeter:
    """Measure the peak memory of a block of code; meters nest.

        with MemoryMeter() as meter:
            model = load_model(folder)
        print(meter.peak_bytes, meter.growth_bytes)

    Args:
        interval_s: seconds between two samples where sampling is needed.
        device: a CUDA device whose peaks are read too; None reads the current one when CUDA is in use.
        trim: give free pages back to the system at the start (some milliseconds).
        high_water: use the kernel's high-water mark where it can be reset; False samples always.
    """

    _lock = threading.Lock()
    _active: list[MemoryMeter] = []  # noqa: RUF012  (shared on purpose: a reset must not rob the meters around it)

    def __init__(
        self,
        *,
        interval_s: float = 0.01,
        device: str | torch.device | None = None,
        trim: bool = True,
        high_water: bool = True,
    ) -> None:
        self.interval_s = interval_s
        self.trim = trim
        self.start_bytes = 0
        self.end_bytes = 0
        self.seconds = 0.0
        self.method = "sampled"
        self._peak_bytes = 0
        self._want_high_water = high_water
        self._device = torch.device(device) if device is not None else None
        self._cuda_start: int | None = None
        self._cuda_allocated = 0
        self._cuda_reserved = 0
        self._running = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._started_at = 0.0

    def __enter__(self) -> MemoryMeter:
        if self.trim:
            release_free_memory()
        with MemoryMeter._lock:
            for meter in MemoryMeter._active:
                meter._note_peaks()
            if self._want_high_water and _reset_high_water():
                self.method = "high-water"
            self._reset_cuda()
            self.start_bytes = self._peak_bytes = resident_bytes()
            self._running = True
            MemoryMeter._active.append(self)
        self._started_at = time.perf_counter()
        if self.method == "sampled":
            self._thread = threading.Thread(target=self._sample, name="burnish-memory-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._started_at
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        with MemoryMeter._lock:
            self._note_peaks()
            MemoryMeter._active.remove(self)
            self._running = False
        self.end_bytes = resident_bytes()

    @property
    def peak_bytes(self) -> int:
        """The highest resident set so far (while running) or of the whole block (afterwards)."""
        if self._running:
            with MemoryMeter._lock:
                self._note_peaks()
        return self._peak_bytes

    @property
    def growth_bytes(self) -> int:
        """Peak over start."""
        return max(0, self.peak_bytes - self.start_bytes)

    def reading(self) -> MemoryReading:
        """Everything seen, as a value."""
        peak = self.peak_bytes
        cuda = self._cuda_start is not None
        return MemoryReading(
            start_bytes=self.start_bytes,
            peak_bytes=peak,
            end_bytes=resident_bytes() if self._running else self.end_bytes,
            seconds=time.perf_counter() - self._started_at if self._running else self.seconds,
            method=self.method,
            cuda_start_bytes=self._cuda_start,
            cuda_allocated_peak_bytes=self._cuda_allocated if cuda else None,
            cuda_reserved_peak_bytes=self._cuda_reserved if cuda else None,
        )

    def _note_peaks(self) -> None:
        seen = resident_bytes()
        if self.method == "high-water":
            seen = max(seen, _high_water_bytes() or 0)
        self._peak_bytes = max(self._peak_bytes, seen)
        if self._cuda_start is not None:
            self._cuda_allocated = max(self._cuda_allocated, torch.cuda.max_memory_allocated(self._device))
            self._cuda_reserved = max(self._cuda_reserved, torch.cuda.max_memory_reserved(self._device))

    def _reset_cuda(self) -> None:
        wanted = self._device is not None and self._device.type == "cuda"
        if self._device is not None and not wanted:
            return
        if not torch.cuda.is_available() or not (wanted or torch.cuda.is_initialized()):
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        self._cuda_start = torch.cuda.memory_allocated(self._device)

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._peak_bytes = max(self._peak_bytes, resident_bytes())


def _high_water_bytes() -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _reset_high_water() -> bool:
    """Set the kernel's mark back to the present resident set; False where that is not possible or has no effect."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    mark = _high_water_bytes()
    return mark is not None and mark <= resident_bytes() + _RESET_SLACK


@dataclass(frozen=True, kw_only=True)
class ComponentBytes:
    """Bytes of real tensors by what they are for. Activations live too briefly to be counted here."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    kv: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.kv + self.other

    def to_dict(self) -> dict[str, int]:
        """The components as JSON values."""
        return asdict(self)


def component_bytes(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    kv: Iterable[Tensor] = (),
    other: Iterable[Tensor] = (),
) -> ComponentBytes:
    """Count what a model and its company hold now.

    A storage that several tensors share counts once, in the first component that names it (in the order of the
    fields of `ComponentBytes`). Buffers, and so the packed tensors of quantized linears, count as weights.
    Tensors on the meta device hold nothing.
    """
    ledger = _StorageLedger()
    return ComponentBytes(
        weights=ledger.add(_module_tensors(model)),
        gradients=ledger.add(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=ledger.add(_optimizer_tensors(optimizer)),
        kv=ledger.add(kv),
        other=ledger.add(other),
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors cover, shared storage once."""
    return _StorageLedger().add(tensors)


def module_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones once."""
    return tensor_bytes(_module_tensors(model))


@dataclass(frozen=True, kw_only=True)
class DtypeRow:
    """The elements that a model holds in one dtype. Packed tensors count the integers that they store."""

    dtype: str
    elements: int
    bytes: int
    share: float
    """Of all elements, 0..1."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def dtype_table(model: nn.Module) -> list[DtypeRow]:
    """Elements and bytes per dtype, largest first; tied tensors once, quantized buffers included."""
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    seen: set[tuple[Any, ...]] = set()
    for tensor in _module_tensors(model):
        key = _identity(tensor)
        if key in seen:
            continue
        seen.add(key)
        dtype = str(tensor.dtype).removeprefix("torch.")
        elements[dtype] = elements.get(dtype, 0) + tensor.numel()
        sizes[dtype] = sizes.get(dtype, 0) + tensor.numel() * tensor.element_size()
    total = sum(elements.values())
    rows = [
        DtypeRow(dtype=dtype, elements=count, bytes=sizes[dtype], share=count / total if total else 0.0)
        for dtype, count in elements.items()
    ]
    return sorted(rows, key=lambda row: (-row.elements, row.dtype))


def _module_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    if optimizer is None:
        return
    pending: list[Any] = list(optimizer.state.values())
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _StorageLedger:
    """Byte ranges already counted, per storage: a view of a large mapped file counts what it covers, no more."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}

    def add(self, tensors: Iterable[Tensor]) -> int:
        return sum(self._add_one(tensor) for tensor in tensors)

    def _add_one(self, tensor: Tensor) -> int:
        if tensor.is_meta or tensor.numel() == 0:
            return 0
        span = 1 + sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride()))
        start = int(tensor.storage_offset()) * tensor.element_size()
        key = (str(tensor.device), tensor.untyped_storage().data_ptr())
        ranges = self._ranges.setdefault(key, [])
        before = sum(stop - begin for begin, stop in ranges)
        merged: list[tuple[int, int]] = []
        for begin, stop in sorted([*ranges, (start, start + span * tensor.element_size())]):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
            else:
                merged.append((begin, stop))
        self._ranges[key] = merged
        return sum(stop - begin for begin, stop in merged) - before
