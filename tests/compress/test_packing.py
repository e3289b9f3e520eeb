from __future__ import annotations

import numpy as np
import pytest
import torch
from gptq_reader import stream_values

from burnish.compress.packing import num_words, pack, unpack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32, 52, 172])
def test_unpack_returns_what_was_packed_for_any_length(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (count, 5), generator=torch.Generator().manual_seed(0))
    words = pack(values, bits)
    assert words.shape == (num_words(count, bits), 5)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, count).long(), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_writes_the_stream_that_another_reader_expects(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (75, 3), generator=torch.Generator().manual_seed(1))
    words = pack(values, bits).numpy()
    for column in range(3):
        assert np.array_equal(stream_values(words[:, column], bits, 75), values[:, column].numpy())


def test_pack_puts_the_first_value_in_the_lowest_bits() -> None:
    values = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])
    assert pack(values, 4).item() == 0x87654321 - (1 << 32)


def test_three_bit_values_straddle_two_words() -> None:
    values = torch.full((32, 1), 0)
    values[10] = 0b110  # bits 30, 31 and 32 of the stream
    assert pack(values, 3).flatten().tolist() == [-(1 << 31), 0b1, 0]


def test_filling_bits_are_zero_where_values_end_inside_a_word() -> None:
    assert pack(torch.full((1, 1), 15), 4).item() == 15
