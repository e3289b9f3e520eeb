"""Rebuilding frozen weights of 4 and 8 bits on the compiled kernels; see `training.py`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from burnish.kernels.cpu.library import CpuLibrary, load
from burnish.kernels.cpu.training_passes import FORMATS, Passes, check_rows, pointer
from burnish.kernels.cpu.training_structs import DequantizePass
from burnish.kernels.training_reference import SCALES_PER_BLOCK

# O out features (rows), I in features, P pairs of weights (bytes), B blocks


class WeightKernels(Passes):
    """Dense rows from small formats, bit for bit those of the twins."""

    def dequantize_blocks(
        self,
        packed_P: Tensor,
        absmax_B: Tensor,
        out_OI: Tensor,
        *,
        levels: tuple[float, ...],
        block_size: int,
        absmax_levels: Tensor | None = None,
        absmax_scale: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        """Weights of 4 bits in blocks that share a scale and go on from row to row, each rounded once from float32.

        Args:
            packed_P: (ceil(O * I / 2),), uint8, two weights a byte, the first in the upper half.
            absmax_B: (blocks,), float32; or uint8, indices into `absmax_levels`.
            out_OI: float32 or bfloat16, filled and returned; rows may lie apart.
            levels: what each of the 16 codes stands for.
            block_size: weights per scale.
            absmax_levels: (256,), float32, as the two below: the scale is its level times `absmax_scale` of its 256
                blocks, plus `absmax_offset`.
        """
        weights = out_OI.numel()
        blocks = -(-weights // block_size)
        double = absmax_levels is not None
        assert len(levels) == 16
        assert block_size > 0
        check_rows(out_OI.dtype, out_OI.shape, out_OI)
        _check(packed_P, -(-weights // 2), torch.uint8)
        _check(absmax_B, blocks, torch.uint8 if double else torch.float32)
        if double:
            assert absmax_scale is not None
            assert absmax_offset is not None
            _check(absmax_levels, 256, torch.float32)
            _check(absmax_scale, -(-blocks // SCALES_PER_BLOCK), torch.float32)
            _check(absmax_offset, 1, torch.float32)
        struct = DequantizePass(
            format=FORMATS[out_OI.dtype],
            rows=out_OI.shape[0],
            width=out_OI.shape[1],
            block_size=block_size,
            codes=packed_P.data_ptr(),
            levels=_table(levels).data_ptr(),
            absmax=absmax_B.data_ptr(),
            absmax_levels=pointer(absmax_levels),
            absmax_scale=pointer(absmax_scale),
            absmax_offset=pointer(absmax_offset),
            out=out_OI.data_ptr(),
            out_stride=out_OI.stride(0),
        )
        self._call("dequantize", struct)
        return out_OI

    def dequantize_rows(self, codes_OI: Tensor, scale_O: Tensor, out_OI: Tensor) -> Tensor:
        """Weights of 8 bits with a scale per row, each rounded once from float32.

        Args:
            codes_OI: int8, contiguous.
            scale_O: float32, contiguous.
            out_OI: float32 or bfloat16, filled and returned; rows may lie apart.
        """
        assert codes_OI.shape == out_OI.shape
        check_rows(out_OI.dtype, out_OI.shape, out_OI)
        _check(codes_OI, out_OI.numel(), torch.int8)
        _check(scale_O, out_OI.shape[0], torch.float32)
        struct = DequantizePass(
            format=FORMATS[out_OI.dtype],
            rows=out_OI.shape[0],
            width=out_OI.shape[1],
            codes=codes_OI.data_ptr(),
            absmax=scale_O.data_ptr(),
            out=out_OI.data_ptr(),
            out_stride=out_OI.stride(0),
        )
        self._call("dequantize", struct)
        return out_OI


def weight_kernels(device: torch.device, dtype: torch.dtype) -> WeightKernels | None:
    """The kernels that give weights of this dtype there, on torch's number of threads; None where there are none."""
    if device.type != "cpu" or dtype not in FORMATS:
        return None
    library = load()
    return None if library is None else _of(library)


@lru_cache
def _of(library: CpuLibrary) -> WeightKernels:
    return WeightKernels(library)


@lru_cache
def _table(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)


def _check(tensor: Tensor | None, numel: int, dtype: torch.dtype) -> None:
    assert tensor is not None
    assert tensor.numel() == numel
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
