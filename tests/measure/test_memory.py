"""The meter sees what is allocated, nested or not, and tensors are counted once."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import nn

from burnish.measure.memory import (
    MemoryMeter,
    component_bytes,
    dtype_table,
    module_bytes,
    tensor_bytes,
)

MB = 10**6


def allocate(size: int) -> torch.Tensor:
    """`size` bytes that are really there: every page is written, and given back when it is dropped.

    The C library's heap would do neither for sure after other tests have left free blocks in it.
    """
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)


@pytest.mark.parametrize("high_water", [True, False])
def test_meter_sees_a_hundred_megabytes_within_five_per_cent(high_water: bool) -> None:
    with MemoryMeter(high_water=high_water, interval_s=0.002) as meter:
        block = allocate(100 * MB)
        assert meter.peak_bytes - meter.start_bytes >= 95 * MB  # readable while it runs
        del block
    assert meter.growth_bytes == pytest.approx(100 * MB, rel=0.05)
    assert meter.end_bytes < meter.peak_bytes - 80 * MB
    assert meter.reading().growth_bytes == meter.growth_bytes


@pytest.mark.parametrize("high_water", [True, False])
def test_growth_is_nothing_when_nothing_is_allocated(high_water: bool) -> None:
    kept = allocate(50 * MB)
    with MemoryMeter(high_water=high_water) as meter:
        sum(range(1000))
    assert meter.growth_bytes < 2 * MB
    assert meter.start_bytes >= 50 * MB
    del kept


def test_a_short_peak_between_two_samples_is_seen_where_the_kernel_keeps_the_mark() -> None:
    with MemoryMeter(interval_s=10) as meter:
        del_at_once = allocate(60 * MB)
        del del_at_once
    if meter.method != "high-water":
        pytest.skip("the high-water mark cannot be reset here")
    assert meter.growth_bytes >= 57 * MB


def test_an_outer_meter_keeps_its_peak_when_an_inner_one_resets_the_mark() -> None:
    with MemoryMeter() as outer:
        early = allocate(80 * MB)
        del early
        with MemoryMeter() as inner:
            late = allocate(20 * MB)
            del late
    assert outer.growth_bytes == pytest.approx(80 * MB, rel=0.05)
    assert inner.growth_bytes < 30 * MB


def test_meter_stops_cleanly_when_the_block_raises() -> None:
    meter = MemoryMeter(high_water=False)
    with pytest.raises(KeyError), meter:
        raise KeyError("inside")
    assert meter.peak_bytes >= meter.start_bytes > 0
    assert meter._thread is not None
    assert not meter._thread.is_alive()


def test_components_count_weights_gradients_optimizer_and_kv_exactly() -> None:
    model = nn.Linear(10, 7, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 10)).sum().backward()
    optimizer.step()
    cache = torch.zeros(2, 5, 16, dtype=torch.bfloat16)
    found = component_bytes(model, optimizer=optimizer, kv=[cache, cache[0]])
    assert found.weights == 280
    assert found.gradients == 280
    assert found.optimizer == 2 * 280 + 4  # two moments and the step count
    assert found.kv == 320
    assert found.total == 280 + 280 + 564 + 320


def test_tied_weights_and_views_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 4), "head": nn.Linear(4, 11, bias=False)})
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    assert module_bytes(model) == 11 * 4 * 4
    assert dtype_table(model)[0].elements == 44
    buffer = torch.zeros(100)
    assert tensor_bytes([buffer[:10], buffer[5:20], buffer[90:]]) == 4 * 30
    assert component_bytes(nn.Module(), kv=[buffer], other=[buffer[:50]]).other == 0


def test_tensors_on_the_meta_device_hold_nothing() -> None:
    assert module_bytes(nn.Linear(1000, 1000, device="meta")) == 0


def test_dtype_table_counts_packed_buffers_and_shares_sum_to_one() -> None:
    model = nn.Module()
    model.register_parameter("scales", nn.Parameter(torch.zeros(25, dtype=torch.float16)))
    model.register_buffer("qweight", torch.zeros(75, dtype=torch.int32))
    rows = dtype_table(model)
    assert [(row.dtype, row.elements, row.bytes) for row in rows] == [("int32", 75, 300), ("float16", 25, 50)]
    assert [row.share for row in rows] == [0.75, 0.25]
    assert dtype_table(nn.Module()) == []
