from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.train.packing_plan import pack_in_order, pack_rows

LENGTHS = st.lists(st.integers(1, 60), max_size=80)


def plain_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """The algorithm as it is told: the fullest group with room, found by looking at all."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = [group for group in groups if sum(lengths[r] for r in group) + lengths[row] <= room]
        if fits:
            max(fits, key=lambda group: sum(lengths[r] for r in group)).append(row)
        else:
            groups.append([row])
    return groups


@given(lengths=LENGTHS, room=st.integers(1, 70))
def test_every_row_is_packed_once_and_no_group_overflows(lengths: list[int], room: int) -> None:
    for groups in (pack_rows(lengths, room), pack_in_order(lengths, room)):
        assert sorted(chain.from_iterable(groups)) == list(range(len(lengths)))
        assert all(groups)
        for group in groups:
            assert len(group) == 1 or sum(lengths[row] for row in group) <= room


@given(lengths=LENGTHS, room=st.integers(1, 70))
def test_groups_are_those_of_plain_best_fit(lengths: list[int], room: int) -> None:
    def fill(groups: list[list[int]]) -> list[list[int]]:
        return sorted(sorted(lengths[row] for row in group) for group in groups)

    ours, plain = pack_rows(lengths, room), plain_best_fit(lengths, room)
    assert len(ours) == len(plain)
    assert fill(ours) == fill(plain)


@given(lengths=LENGTHS, room=st.integers(60, 90), seed=st.randoms(use_true_random=False))
def test_number_of_groups_does_not_hang_on_the_order(lengths: list[int], room: int, seed) -> None:
    mixed = list(lengths)
    seed.shuffle(mixed)
    assert len(pack_rows(mixed, room)) == len(pack_rows(lengths, room))


def test_groups_are_nearly_full() -> None:
    lengths = [20 + (number * 7919) % 280 for number in range(3000)]
    groups = pack_rows(lengths, 1024)
    assert sum(lengths) / (1024 * len(groups)) > 0.99


def test_neighbours_stay_in_order() -> None:
    assert pack_in_order([3, 4, 9, 1, 1], 7) == [[0, 1], [2], [3, 4]]


def test_bounds_are_checked() -> None:
    assert pack_rows([], 5) == pack_in_order([], 5) == []
    assert pack_rows([9, 2, 3], 5) == [[0], [2, 1]]
    with pytest.raises(ValueError, match="at least 1"):
        pack_rows([1], 0)
