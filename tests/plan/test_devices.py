"""The catalogue."""

from __future__ import annotations

import pytest

from burnish.errors import ConfigError
from burnish.plan.devices import DEVICES, find_device, smallest_that_holds

PROMISED = [
    "t4",
    "p100",
    "v100-16g",
    "a10g",
    "l4",
    "rtx-3060-12g",
    "rtx-3090",
    "rtx-4090",
    "a100-40g",
    "a100-80g",
    "h100-80g",
    "h200",
]


def test_catalogue_has_every_promised_device() -> None:
    assert list(DEVICES) == PROMISED


@pytest.mark.parametrize("name", PROMISED)
def test_figures_are_in_the_right_units(name: str) -> None:
    device = DEVICES[name]
    assert 10e9 < device.memory_bytes < 160e9
    assert device.bandwidth is not None
    assert 2e11 < device.bandwidth < 1e13
    assert device.fp32 is not None
    assert 5e12 < device.fp32 < 1e14
    assert device.rate("float16") >= device.fp32  # type: ignore[operator]
    assert device.bfloat16 == (device.bf16 is not None)
    assert device.usable_bytes < device.memory_bytes
    assert device.source


def test_formats_without_a_path_run_at_the_float32_rate() -> None:
    assert DEVICES["p100"].rate("int8") == DEVICES["p100"].fp32
    assert DEVICES["t4"].rate("bfloat16") == DEVICES["t4"].fp32


def test_cpu_is_this_machine() -> None:
    device = find_device("cpu")
    assert device.kind == "cpu"
    assert device.memory_bytes > 2**28
    assert device.fp32 is not None


def test_unknown_device_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean a100-40g\?"):
        find_device("a100-40gb")


def test_smallest_that_holds_is_the_least_memory() -> None:
    twenty = smallest_that_holds(20 * 2**30)
    assert twenty is not None
    assert twenty.name == "a10g"
    assert smallest_that_holds(2**40) is None
