"""What devices can hold and do: a catalogue of GPUs from their makers' data sheets, and the record all of them share.

The machine that burnish runs on is described by `hardware.this_machine`. Rates are dense peaks at boost clock, without
structured sparsity; what a program reaches of them is in `timing.py`.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from burnish.errors import ConfigError

MIB = 1024**2

GPU_USABLE = 0.97  # the caching allocator cannot hand out every last block
CPU_USABLE = 0.90  # the system, its page cache and other processes


@dataclass(frozen=True, kw_only=True)
class Device:
    """One processor with its memory.

    Attributes:
        name: what `--device` takes.
        title: for people.
        kind: "cuda" or "cpu".
        memory_bytes: what the driver reports as total, which is less than the label where error correction takes some.
        bandwidth: bytes per second between the processor and that memory; None when unknown.
        fp32, fp16, bf16, int8: peak operations per second of a dense matrix product in that format with float32 (int32)
            sums; None where the device has no faster path for it or the rate is unknown.
        bfloat16: whether it multiplies bfloat16 matrices in hardware.
        source: where the figures come from.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    bandwidth: float | None
    fp32: float | None
    fp16: float | None
    bf16: float | None
    int8: float | None
    bfloat16: bool
    source: str

    def rate(self, dtype: str) -> float | None:
        """Peak operations per second in `dtype`; a format without its own path runs at the float32 rate."""
        own = {"float16": self.fp16, "bfloat16": self.bf16, "int8": self.int8}.get(dtype)
        return self.fp32 if own is None else own

    @property
    def usable_bytes(self) -> int:
        """Memory that one process can count on; the rest is fragmentation's or the system's."""
        return int(self.memory_bytes * (GPU_USABLE if self.kind == "cuda" else CPU_USABLE))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def _gpu(name: str, title: str, mib: int, gb_s: float, rates: tuple[float | None, ...], source: str) -> Device:
    """An entry in the units of data sheets: MiB, GB/s, then fp32, fp16, bf16 and int8 in TFLOPS (TOPS)."""
    fp32, fp16, bf16, int8 = (None if rate is None else rate * 1e12 for rate in rates)
    return Device(
        name=name,
        title=title,
        kind="cuda",
        memory_bytes=mib * MIB,
        bandwidth=gb_s * 1e9,
        fp32=fp32,
        fp16=fp16,
        bf16=bf16,
        int8=int8,
        bfloat16=bf16 is not None,
        source=source,
    )


# Memory is nvidia-smi's "total". P100 and V100 have no tensor path for int8. GeForce rates are those with float32 sums,
# half of what the boxes say. Data sheets that print rates with sparsity only (L4, H100, H200) are halved.
_CATALOGUE = (
    _gpu("t4", "NVIDIA T4 16 GB", 15360, 320, (8.1, 65, None, 130), "NVIDIA T4 data sheet"),
    _gpu("p100", "NVIDIA Tesla P100 PCIe 16 GB", 16280, 732, (9.3, 18.7, None, None), "NVIDIA Tesla P100 data sheet"),
    _gpu("v100-16g", "NVIDIA V100 PCIe 16 GB", 16160, 900, (14, 112, None, None), "NVIDIA V100 data sheet, PCIe"),
    _gpu("a10g", "NVIDIA A10G 24 GB", 23028, 600, (35, 70, 70, 140), "NVIDIA A10G data sheet"),
    _gpu("l4", "NVIDIA L4 24 GB", 23034, 300, (30.3, 121, 121, 242), "NVIDIA L4 data sheet, dense"),
    _gpu(
        "rtx-3060-12g",
        "GeForce RTX 3060 12 GB",
        12288,
        360,
        (12.7, 25.5, 25.5, 102),
        "NVIDIA Ampere data",
    ),
    _gpu("rtx-3090", "GeForce RTX 3090 24 GB", 24576, 936, (35.6, 71, 71, 284), "NVIDIA GA102 white paper"),
    _gpu("rtx-4090", "GeForce RTX 4090 24 GB", 24564, 1008, (82.6, 165.2, 165.2, 660.6), "NVIDIA Ada white paper"),
    _gpu("a100-40g", "NVIDIA A100 40 GB", 40960, 1555, (19.5, 312, 312, 624), "NVIDIA A100 data sheet"),
    _gpu("a100-80g", "NVIDIA A100 SXM 80 GB", 81920, 2039, (19.5, 312, 312, 624), "NVIDIA A100 data sheet, SXM"),
    _gpu("h100-80g", "NVIDIA H100 SXM 80 GB", 81559, 3350, (67, 989, 989, 1979), "NVIDIA H100 data sheet, SXM, dense"),
    _gpu("h200", "NVIDIA H200 SXM 141 GB", 143771, 4800, (67, 989, 989, 1979), "NVIDIA H200 data sheet, dense"),
)

DEVICES: dict[str, Device] = {device.name: device for device in _CATALOGUE}
"""GPUs by name, smallest first among equals; "cpu" is not here: it is this machine (`hardware.this_machine`)."""


def find_device(name: str) -> Device:
    """The device that `--device` names; "cpu" is this machine's processor, "cuda" its card.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "cpu":
        from burnish.plan.hardware import this_machine

        return this_machine()
    if name == "cuda" or name.startswith("cuda:"):
        from burnish.plan.hardware import this_card

        card = this_card()
        if card is None:
            raise ConfigError(
                "there is no NVIDIA card here", got=name, remedy="Name a card of the catalogue, such as t4."
            )
        return card
    if name not in DEVICES:
        close = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.5)
        raise ConfigError(
            f"no device is named {name!r}",
            expected=f"cpu, {', '.join(DEVICES)}",
            remedy=f"Did you mean {close[0]}?" if close else None,
        )
    return DEVICES[name]


def smallest_that_holds(num_bytes: int) -> Device | None:
    """The GPU with the least memory whose `usable_bytes` hold `num_bytes`; None when no single one does."""
    fitting = [device for device in DEVICES.values() if device.usable_bytes >= num_bytes]
    return min(fitting, key=lambda device: device.memory_bytes, default=None)
