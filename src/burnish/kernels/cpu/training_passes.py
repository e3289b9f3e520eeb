"""Calling one pass of fine-tuning's compiled kernels: threads, errors, and what keeps C++ inside the tensors."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import DataError, OutOfMemoryError
from burnish.kernels.cpu.library import CpuLibrary, load
from burnish.kernels.cpu.structs import Format
from burnish.kernels.cpu.training_structs import PASS_FUNCTIONS, PASSES

FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}


class Passes:
    """The library's passes by name, on a fixed number of threads; see `TrainingKernels`."""

    def __init__(self, library: CpuLibrary | None = None, *, threads: int | None = None) -> None:
        library = library or load()
        assert library is not None, "no compiled kernels: ask available() first"
        self.library = library
        self.threads = threads
        self._name = library.isa.encode()
        self._functions = _declared(library.path)
        self._functions["use_openmp"](_openmp_of_torch())

    def _call(self, name: str, struct: ctypes.Structure) -> None:
        assert not self._status(name, struct)

    def _status(self, name: str, struct: ctypes.Structure) -> int:
        """Run a pass; what it returns where that is its own, 0 when all went well."""
        threads = torch.get_num_threads() if self.threads is None else self.threads
        status = self._functions[name](self._name, ctypes.byref(struct), threads)
        assert status != 2, "no such kernels"
        assert status != 4, "sequences end before they begin"
        if status == 3:
            raise DataError("a label is outside the vocabulary", expected="-100 or an id below the logits' width")
        if status == 1:
            raise OutOfMemoryError("the machine has no memory for the buffers of a training kernel")
        return status


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def stride_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


# The asserts below keep C++ inside the tensors' memory.


def check_rows(dtype: torch.dtype, shape: torch.Size, *tensors: Tensor | None) -> None:
    assert dtype in FORMATS, dtype
    for tensor in tensors:
        if tensor is None:
            continue
        assert tensor.dtype == dtype and tensor.shape == shape, (tensor.dtype, dtype, tensor.shape, shape)  # noqa: PT018
        assert shape[1] == 1 or tensor.stride(1) == 1, "the values of a row lie side by side"
        assert tensor.device.type == "cpu"


def check_heads(dtype: torch.dtype, rows: int, head_dim: int, *tensors: Tensor) -> None:
    assert dtype in FORMATS, dtype
    for tensor in tensors:
        assert tensor.dtype == dtype
        assert tensor.shape[0] == rows
        assert tensor.shape[2] == head_dim
        assert head_dim == 1 or tensor.stride(2) == 1, "the features of a head lie side by side"
        assert tensor.shape[1] == 1 or tensor.stride(1) == head_dim, "the heads of a row lie side by side"
        assert tensor.device.type == "cpu"


@functools.cache
def _declared(path: Path) -> dict[str, Any]:
    """The library's passes by name, with the types of their arguments."""
    opened = ctypes.CDLL(str(path))
    opened.burnish_size_of_pass.restype = c_int64
    sizes = [opened.burnish_size_of_pass(c_int32(which)) for which in range(len(PASSES))]
    assert sizes == [ctypes.sizeof(struct) for struct in PASSES], "training_structs.py and training.h differ"
    opened.burnish_use_openmp.restype = None
    opened.burnish_use_openmp.argtypes = [c_void_p]
    functions: dict[str, Any] = {"use_openmp": opened.burnish_use_openmp}
    for name, struct in PASS_FUNCTIONS.items():
        functions[name] = getattr(opened, f"burnish_{name}")
        functions[name].restype = c_int32
        functions[name].argtypes = [c_char_p, ctypes.POINTER(struct), c_int32]
    return functions


@functools.cache
def _openmp_of_torch() -> int | None:
    """Address of the function that starts a team in the OpenMP library that torch runs on; None where there is none."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, c_void_p).value
    return None
