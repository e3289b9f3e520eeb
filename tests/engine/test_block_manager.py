"""Blocks are given, shared, kept, evicted and given back, and none is ever lost or handed to two owners."""

from __future__ import annotations

import pytest
from fake_cache import make_sequence

from burnish.engine.block_manager import BlockManager


def compute(blocks: BlockManager, sequence: object, num_tokens: int) -> None:
    """As if the first `num_tokens` tokens had been computed."""
    assert blocks.reserve(sequence, num_tokens)  # type: ignore[arg-type]
    sequence.num_computed = num_tokens  # type: ignore[attr-defined]
    blocks.publish(sequence)  # type: ignore[arg-type]


def test_full_blocks_are_shared_and_partial_ones_not() -> None:
    blocks = BlockManager(10, block_size=4)
    first, second = make_sequence(0, list(range(11))), make_sequence(1, [*range(9), 50, 51])
    compute(blocks, first, 11)
    assert blocks.match(second, limit=10) == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert blocks.reserve(second, 11)
    assert second.block_table[2] != first.block_table[2]
    blocks.check_integrity([first, second])
    assert blocks.num_used == 4


def test_match_stops_at_the_limit() -> None:
    blocks = BlockManager(10, block_size=4)
    first, second = make_sequence(0, list(range(8))), make_sequence(1, list(range(8)))
    compute(blocks, first, 8)
    assert blocks.match(second, limit=7) == 4


def test_blocks_are_not_published_before_they_are_computed() -> None:
    blocks = BlockManager(10, block_size=4)
    first, second = make_sequence(0, list(range(12))), make_sequence(1, list(range(12)))
    assert blocks.reserve(first, 12)
    first.num_computed = 7
    blocks.publish(first)
    assert blocks.match(second, limit=11) == 4


def test_different_salts_never_share() -> None:
    blocks = BlockManager(10, block_size=4)
    first, second = make_sequence(0, list(range(9))), make_sequence(1, list(range(9)))
    first.cache_salt, second.cache_salt = (0, 0), (1, 0)
    compute(blocks, first, 9)
    assert blocks.match(second, limit=8) == 0


def test_equal_tokens_after_different_beginnings_are_not_shared() -> None:
    blocks = BlockManager(10, block_size=2)
    first, second = make_sequence(0, [1, 2, 5, 6, 9]), make_sequence(1, [3, 4, 5, 6, 9])
    compute(blocks, first, 4)
    assert blocks.match(second, limit=4) == 0


def test_freed_blocks_are_found_until_they_are_needed() -> None:
    blocks = BlockManager(4, block_size=2)
    first, again = make_sequence(0, [1, 2, 3, 4, 5]), make_sequence(1, [1, 2, 3, 4, 6])
    compute(blocks, first, 5)
    blocks.free(first)
    assert (blocks.num_free, blocks.num_cached) == (4, 2)
    assert blocks.match(again, limit=4) == 4
    blocks.free(again)
    greedy = make_sequence(2, [9] * 5)
    assert blocks.reserve(greedy, 5)
    # The end of the chain went, its beginning is still found.
    assert blocks.match(again, limit=4) == 2
    blocks.check_integrity([greedy, again])


def test_longest_unused_block_is_evicted_first() -> None:
    blocks = BlockManager(3, block_size=2)
    sequences = [make_sequence(index, [index + 10, index + 20, 0]) for index in range(3)]
    for sequence in sequences:
        compute(blocks, sequence, 2)
    for index in (1, 0, 2):
        blocks.free(sequences[index])
    assert blocks.match(sequences[1], limit=2) == 2
    blocks.free(sequences[1])
    assert blocks.reserve(make_sequence(9, [7]), 1)
    assert [blocks.match(sequence, limit=2) for sequence in sequences] == [0, 2, 2]


def test_reserve_that_fails_changes_nothing() -> None:
    blocks = BlockManager(3, block_size=4)
    first, second = make_sequence(0, [1] * 8), make_sequence(1, [2] * 8)
    assert blocks.reserve(first, 8)
    assert not blocks.reserve(second, 8)
    assert not second.block_table
    assert blocks.reserve(second, 4)


def test_blocks_behind_the_window_are_given_back() -> None:
    blocks = BlockManager(10, block_size=4, window=6)
    sequence = make_sequence(0, list(range(40)))
    compute(blocks, sequence, 20)
    # The query at 20 sees 15..20: block 3 is the first it needs.
    assert list(sequence.block_table[:4]) == [-1, -1, -1, sequence.block_table[3]]
    assert sequence.block_table[3] >= 0
    assert blocks.num_used == 2
    blocks.check_integrity([sequence])
    blocks.free(sequence)
    assert blocks.num_used == 0
    assert blocks.most_blocks(1000, chunk=8) == 5


@pytest.mark.parametrize("window", [None, 5])
def test_without_prefix_caching_nothing_is_kept(window: int | None) -> None:
    blocks = BlockManager(6, block_size=2, prefix_caching=False, window=window)
    first, second = make_sequence(0, [1, 2, 3, 4, 5]), make_sequence(1, [1, 2, 3, 4, 5])
    compute(blocks, first, 5)
    assert blocks.match(second, limit=4) == 0
    blocks.free(first)
    assert (blocks.num_cached, blocks.num_free) == (0, 6)


def test_integrity_check_sees_a_lost_block() -> None:
    blocks = BlockManager(6, block_size=2)
    sequence = make_sequence(0, [1, 2, 3])
    assert blocks.reserve(sequence, 3)
    blocks.check_integrity([sequence])
    sequence.block_table.pop()
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check_integrity([sequence])
