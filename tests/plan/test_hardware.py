"""Finding out what this machine is, with made-up cgroups where that matters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.plan import hardware


def test_processor_is_found() -> None:
    found = hardware.processor()
    assert found.name
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 0 <= found.available_bytes <= found.memory_bytes


def test_quota_of_a_container_limits_cores(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert hardware.usable_cores(root=tmp_path) == 1


def test_no_quota_leaves_the_affinity(tmp_path: Path) -> None:
    affinity = hardware.usable_cores(root=tmp_path)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.usable_cores(root=tmp_path) == affinity


def test_old_cgroups_limit_cores_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert hardware.usable_cores(root=tmp_path) == 1


def test_memory_limit_of_a_container_is_the_lowest(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert hardware.container_memory(root=tmp_path) == (4 * 2**30, 2**30)


def test_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.container_memory(root=tmp_path) == (None, 0)


def test_cards_are_read_and_bad_lines_passed_over() -> None:
    listing = "Tesla T4, 15360, 550.54\nbroken line\nNVIDIA L4, [N/A], 1\n"
    cards = list(hardware.parse_cards(listing))
    assert [(card.name, card.memory_bytes, card.driver) for card in cards] == [("Tesla T4", 15360 * 2**20, "550.54")]


@pytest.mark.parametrize(
    ("name", "mib", "expected"),
    [
        ("Tesla T4", 15360, "t4"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 40960, "a100-40g"),
        ("NVIDIA L40S", 46068, "cuda"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA H200", 143771, "h200"),
    ],
)
def test_card_is_matched_by_name_and_memory(
    name: str, mib: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = hardware.Card(name=name, memory_bytes=mib * 2**20, driver="1")
    monkeypatch.setattr(hardware, "cards", lambda: (card,))
    device = hardware.this_card()
    assert device is not None
    assert device.name == expected
    assert abs(device.memory_bytes - card.memory_bytes) < 0.1 * card.memory_bytes


def test_no_card_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cards", lambda: ())
    assert hardware.this_card() is None
