"""Unsigned integers of 2 to 8 bits packed into 32-bit words, the way GPTQ files hold them.

The values along one axis form a little-endian stream of bits cut into words of 32: with 4 bits, value 8w + i sits in
bits 4i..4i+3 of word w; with 3 bits a value may straddle two words. A stream that ends inside a word is filled with
zeros, so n values take ceil(n * bits / 32) words.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32

# N values or words along the packed axis, C the other axis, P periods, W words of one period, V values of one period


def num_words(num_values: int, bits: int) -> int:
    """Words of 32 bits that hold `num_values` values."""
    return -(-num_values * bits // WORD_BITS)


def _period(bits: int) -> tuple[int, int]:
    """Values and words after which the stream is aligned to a word again."""
    return (WORD_BITS, bits) if WORD_BITS % bits else (WORD_BITS // bits, 1)


def pack(values_NC: Tensor, bits: int) -> Tensor:
    """Pack along the first axis.

    Args:
        values_NC: (values, columns), any integer dtype, each in 0..2**bits - 1.
        bits: bits per value.

    Returns:
        (num_words(values, bits), columns), int32.
    """
    if bits == 4:
        return _pack_nibbles(values_NC)
    num_values, num_columns = values_NC.shape
    values_per, words_per = _period(bits)
    periods = -(-num_values // values_per)
    padded = torch.zeros(periods * values_per, num_columns, dtype=torch.int64, device=values_NC.device)
    padded[:num_values] = values_NC
    padded_PVC = padded.view(periods, values_per, num_columns)
    words_PWC = torch.zeros(periods, words_per, num_columns, dtype=torch.int64, device=values_NC.device)
    for index in range(values_per):
        word, shift = divmod(index * bits, WORD_BITS)
        words_PWC[:, word] |= (padded_PVC[:, index] << shift) & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            words_PWC[:, word + 1] |= padded_PVC[:, index] >> (WORD_BITS - shift)
    words = words_PWC.view(-1, num_columns)[: num_words(num_values, bits)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words_NC: Tensor, bits: int, num_values: int) -> Tensor:
    """Undo `pack`.

    Args:
        words_NC: (num_words(num_values, bits), columns), int32.
        bits: bits per value.
        num_values: how many values the stream holds; the rest is filling.

    Returns:
        (num_values, columns), uint8.
    """
    if bits == 4:
        return _unpack_nibbles(words_NC, num_values)
    num_rows, num_columns = words_NC.shape
    values_per, words_per = _period(bits)
    periods = -(-num_rows // words_per)
    words_WC = torch.zeros(periods * words_per, num_columns, dtype=torch.int32, device=words_NC.device)
    words_WC[:num_rows] = words_NC
    words_PWC = words_WC.view(periods, words_per, num_columns)
    mask = (1 << bits) - 1
    values_PVC = torch.empty(periods, values_per, num_columns, dtype=torch.uint8, device=words_NC.device)
    for index in range(values_per):
        word, shift = divmod(index * bits, WORD_BITS)
        # An arithmetic shift fills with the sign; the mask takes it off again because at most 32 - shift bits are kept.
        kept = min(bits, WORD_BITS - shift)
        value_PC = (words_PWC[:, word] >> shift) & ((1 << kept) - 1)
        if kept < bits:
            value_PC = value_PC | ((words_PWC[:, word + 1] << kept) & mask)
        values_PVC[:, index] = value_PC.to(torch.uint8)
    return values_PVC.view(-1, num_columns)[:num_values]


def _pack_nibbles(values_NC: Tensor) -> Tensor:
    """4 bits by way of bytes, as `_unpack_nibbles`."""
    num_values, num_columns = values_NC.shape
    words = num_words(num_values, 4)
    bytes_CN = torch.zeros(num_columns, 4 * words, dtype=torch.uint8, device=values_NC.device)
    values_CN = values_NC.t().to(torch.uint8)
    bytes_CN[:, : -(-num_values // 2)] = values_CN[:, 0::2]
    bytes_CN[:, : num_values // 2] |= values_CN[:, 1::2] << 4
    return bytes_CN.view(torch.int32).t().contiguous()


def _unpack_nibbles(words_NC: Tensor, num_values: int) -> Tensor:
    """4 bits by way of bytes: several times as quick as by words, which matters when a model is laid out anew."""
    num_rows, num_columns = words_NC.shape
    bytes_CN = words_NC.t().reshape(-1).view(torch.uint8).view(num_columns, 4 * num_rows)
    values_CN = torch.empty(bytes_CN.shape[0], 2 * bytes_CN.shape[1], dtype=torch.uint8, device=words_NC.device)
    values_CN[:, 0::2] = bytes_CN & 0xF
    values_CN[:, 1::2] = bytes_CN >> 4
    return values_CN.t()[:num_values]
