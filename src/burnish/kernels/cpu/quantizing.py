"""Quantizing on the compiled kernels: second moments of calibration inputs, and GPTQ's columns.

The twins: `kernels/quantizing_reference.py` for the moments, `compress/gptq.py` for the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from burnish.errors import CompressionError
from burnish.kernels.cpu.library import CpuLibrary, load
from burnish.kernels.cpu.training_passes import Passes
from burnish.kernels.cpu.training_structs import GptqPass, GramPass

# N tokens (rows), O out features, I in features, G groups

SCALE_TOO_LARGE = 5


class QuantizingKernels(Passes):
    """The passes; no result depends on the number of threads."""

    @property
    def has_moments(self) -> bool:
        """Whether `add_moments` is there: processors without matrix tiles do as well with torch."""
        return self.library.isa == "amx"

    def add_moments(self, x_NI: Tensor, total_II: Tensor) -> None:
        """Add x' x to the lower triangle of `total_II`; what stands above it is of no use.

        Args:
            x_NI: bfloat16; rows may lie apart. Products are exact and summed in float32.
            total_II: contiguous float32.
        """
        assert self.has_moments
        assert x_NI.dtype == torch.bfloat16
        assert x_NI.shape[1] == 1 or x_NI.stride(1) == 1
        _check(total_II, (x_NI.shape[1], x_NI.shape[1]), torch.float32)
        struct = GramPass(
            rows=x_NI.shape[0],
            width=x_NI.shape[1],
            x=x_NI.data_ptr(),
            x_stride=x_NI.stride(0),
            total=total_II.data_ptr(),
        )
        self._call("gram", struct)

    def gptq(
        self,
        weight_OI: Tensor,
        factor_II: Tensor,
        *,
        bits: int,
        width: int,
        symmetric: bool,
        shrinks: Sequence[float] = (),
        importance_I: Tensor | None = None,
        name: str = "weight",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize a weight's columns in order, each one's error taken off those that follow.

        Frantar et al., 2022, arXiv:2210.17323, Algorithm 1. A group's scales are fitted when its first column is
        reached, to what the columns have become by then.

        Args:
            weight_OI: float32, columns in the order of quantization; rows may lie apart. Not modified.
            factor_II: contiguous float32, upper triangular: U with U' U the inverse of the damped Hessian.
            width: columns that share a scale; the last group may be short.
            shrinks: shares of the whole range to try as a scale's; the one of least squared error is taken, columns
                weighted by `importance_I`.
            name: the layer, for messages.

        Returns:
            ints (O, I) uint8, scales (O, G) float32 that float16 holds, zeros (O, G) uint8.

        Raises:
            CompressionError: a scale is beyond float16.
        """
        rows, columns = weight_OI.shape
        assert weight_OI.dtype == torch.float32
        assert columns == 1 or weight_OI.stride(1) == 1
        assert 0 < width <= columns
        _check(factor_II, (columns, columns), torch.float32)
        tried = torch.tensor(shrinks, dtype=torch.float32)
        if shrinks:
            assert importance_I is not None
            _check(importance_I, (columns,), torch.float32)
        groups = -(-columns // width)
        ints_OI = torch.empty(rows, columns, dtype=torch.uint8)
        scales_OG = torch.empty(rows, groups)
        zeros_OG = torch.empty(rows, groups, dtype=torch.uint8)
        struct = GptqPass(
            rows=rows,
            width=columns,
            group=width,
            max_int=(1 << bits) - 1,
            symmetric=symmetric,
            num_shrinks=len(shrinks),
            weight=weight_OI.data_ptr(),
            weight_stride=weight_OI.stride(0),
            factor=factor_II.data_ptr(),
            shrinks=tried.data_ptr(),
            importance=None if importance_I is None else importance_I.data_ptr(),
            ints=ints_OI.data_ptr(),
            scales=scales_OG.data_ptr(),
            zeros=zeros_OG.data_ptr(),
        )
        if self._status("gptq", struct) == SCALE_TOO_LARGE:
            raise CompressionError(f"{name} has weights too large for float16 scales", expected="at most 65504")
        return ints_OI, scales_OG, zeros_OG


def quantizing_kernels(device: torch.device) -> QuantizingKernels | None:
    """The kernels for tensors there, on torch's number of threads; None where there are none."""
    library = load() if device.type == "cpu" else None
    return None if library is None else _of(library)


@lru_cache
def _of(library: CpuLibrary) -> QuantizingKernels:
    return QuantizingKernels(library)


def _check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
