"""One compiled kernel at a time, on tensors: for tests and measurements. Steps of a decoder do not come this way.

Shapes: M rows, N output features, K input features, W width of a row.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from burnish.errors import OutOfMemoryError
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import LANES, PackedLinear
from burnish.kernels.cpu.structs import ACTIVATIONS, Finish, Norm


def linear(
    library: CpuLibrary,
    packed: PackedLinear,
    x_MK: Tensor,
    *,
    finish: Finish = Finish.STORE,
    activation: str = "identity",
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """x W' + b, finished as asked.

    Args:
        x_MK: float32; its rows may lie apart, their features not.
        finish: ADD needs `out`; GATE needs a weight laid out by `packing.interleaved`.
        softcap: 0 is none.
        out: (M, N) float32 whose rows may lie apart, written to; made where it is None.

    Returns:
        (M, N) float32, `out` where it was given; (M, padded N / 2) for GATE; (M,) int64 for ARG_MAX, -1 for NaN.

    Raises:
        OutOfMemoryError: the buffers of the call do not fit.
    """
    rows = _rows(x_MK, width=packed.struct.k)
    num_rows = rows.shape[0]
    width = packed.struct.num_panels * LANES // 2 if finish == Finish.GATE else packed.struct.n
    best = torch.empty(num_rows, dtype=torch.int64)
    if out is None:
        assert finish != Finish.ADD, "ADD needs something to add to"
        out = torch.empty(0 if finish == Finish.ARG_MAX else num_rows, width)
    elif finish != Finish.ARG_MAX:
        assert _rows(out, width=width) is out
        assert out.shape[0] == num_rows
    status = library.functions.burnish_linear(
        library.isa.encode(),
        ctypes.byref(packed.struct),
        rows.data_ptr(),
        rows.stride(0),
        num_rows,
        finish,
        ACTIVATIONS[activation],
        softcap,
        out.data_ptr(),
        out.stride(0),
        best.data_ptr(),
    )
    _check(status)
    return best if finish == Finish.ARG_MAX else out


def norm(library: CpuLibrary, x_MW: Tensor, weight_W: Tensor, *, eps: float, bias_W: Tensor | None = None) -> Tensor:
    """RMS norm, or layer norm where there is a bias: (M, W) float32."""
    x_MW = _rows(x_MW, width=weight_W.shape[0]).contiguous()
    weight_W = weight_W.float().contiguous()
    bias_W = None if bias_W is None else bias_W.float().contiguous()
    struct = Norm(
        kind=1 if bias_W is None else 2,
        width=weight_W.shape[0],
        eps=eps,
        weight=weight_W.data_ptr(),
        bias=None if bias_W is None else bias_W.data_ptr(),
    )
    out = torch.empty_like(x_MW)
    _check(
        library.functions.burnish_norm(
            library.isa.encode(), ctypes.byref(struct), x_MW.data_ptr(), out.data_ptr(), x_MW.shape[0]
        )
    )
    return out


def activate(library: CpuLibrary, raw_W: Tensor, *, activation: str, gated: bool = False) -> Tensor:
    """act(raw), or act(gate) * up where `raw_W` holds sixteen gates and sixteen ups in turn.

    Args:
        raw_W: (W,) float32, W a whole number of sixteens, or of pairs of sixteens where gated.
    """
    width = raw_W.shape[0] // 2 if gated else raw_W.shape[0]
    assert raw_W.dtype == torch.float32
    assert raw_W.is_contiguous()
    assert width % LANES == 0
    out = torch.empty(width)
    _check(
        library.functions.burnish_activate(
            library.isa.encode(), gated, ACTIVATIONS[activation], raw_W.data_ptr(), out.data_ptr(), width
        )
    )
    return out


def _rows(x_MW: Tensor, *, width: int) -> Tensor:
    assert x_MW.dtype == torch.float32
    assert x_MW.shape[1] == width, f"rows of {width}"
    return x_MW if width == 1 or x_MW.stride(1) == 1 else x_MW.contiguous()


def _check(status: int) -> None:
    assert status != 2, "no such kernels"
    if status:
        raise OutOfMemoryError("the machine has no memory for one product's buffers")
