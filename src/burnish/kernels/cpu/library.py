"""Finding and loading the compiled CPU kernels. Torch-free.

The library is built with the package when there is a C++ compiler. Without it, `load` returns None and everything runs
on torch instead. `BURNISH_CPU_KERNELS` picks the instruction set ("amx", "avx512_bf16", "avx512", "avx2", "generic") or
turns the library off ("off"). `BURNISH_CPU_LIBRARY` is a library's path to take in place of the installed one: another
compiler's, or one built to look for errors.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import ConfigError
from burnish.kernels.cpu.structs import STRUCTS, Linear, Norm

ABI = 9
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
ENVIRONMENT = "BURNISH_CPU_KERNELS"
PATH_ENVIRONMENT = "BURNISH_CPU_LIBRARY"


@dataclass(frozen=True, kw_only=True)
class CpuLibrary:
    """The loaded library.

    Attributes:
        functions: the C functions, argument types set.
        isa: instruction set in use, one of `ISAS`.
    """

    functions: ctypes.CDLL
    isa: str
    path: Path


def load(isa: str | None = None) -> CpuLibrary | None:
    """The compiled kernels, or None where they were not built, do not load, or are turned off.

    Args:
        isa: an instruction set; None is the environment's, or the best that runs here.

    Raises:
        ConfigError: the instruction set asked for is unknown or does not run here, or the library that the environment
            names does not load.
    """
    wanted = isa or os.environ.get(ENVIRONMENT) or None
    if wanted == "off":
        return None
    if wanted is not None and wanted not in ISAS:
        raise ConfigError("unknown CPU kernels", got=wanted, expected=f"{', '.join(ISAS)} or off ({ENVIRONMENT})")
    opened, reason = _open()
    if opened is None:
        if os.environ.get(PATH_ENVIRONMENT):
            raise ConfigError(f"the CPU kernels that {PATH_ENVIRONMENT} names cannot be used: {reason}")
        return None
    functions, path = opened
    name = functions.burnish_kernels(None if wanted is None else wanted.encode())
    if name is None:
        raise ConfigError(f"this processor does not run the {wanted} kernels", remedy=f"Unset {ENVIRONMENT}.")
    return CpuLibrary(functions=functions, isa=name.decode(), path=path)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the library was built for and this processor runs; empty without the library."""
    opened, _ = _open()
    if opened is None:
        return ()
    return tuple(isa for isa in ISAS if opened[0].burnish_kernels(isa.encode()) is not None)


def describe() -> dict[str, object]:
    """For `doctor`: {"compiled", "isa", "available", "path", "reason"}; reason says why there is no library."""
    opened, reason = _open()
    if opened is None:
        return {"compiled": False, "isa": None, "available": [], "path": None, "reason": reason}
    try:
        library = load()
    except ConfigError as error:
        return {"compiled": True, "isa": None, "available": [*available_isas()], "path": None, "reason": str(error)}
    off = f"turned off by {ENVIRONMENT}" if library is None else None
    return {
        "compiled": True,
        "isa": None if library is None else library.isa,
        "available": [*available_isas()],
        "path": str(opened[1]),
        "reason": off,
    }


@functools.cache
def _open() -> tuple[tuple[ctypes.CDLL, Path] | None, str | None]:
    """The library and its path, or None and the reason."""
    chosen = os.environ.get(PATH_ENVIRONMENT)
    found = [Path(chosen)] if chosen else sorted(Path(__file__).parent.glob("_burnish_cpu*.so"))
    if not found:
        return None, "not built: no C++ compiler was there when burnish was installed"
    reason = None
    for path in found:
        try:
            functions = ctypes.CDLL(str(path))
            _declare(functions)
        except (OSError, AttributeError) as error:
            reason = f"{path.name} does not load: {error}"
            continue
        sizes = [functions.burnish_size_of(which) for which in range(len(STRUCTS))]
        if functions.burnish_abi() == ABI and sizes == [ctypes.sizeof(struct) for struct in STRUCTS]:
            return (functions, path), None
        reason = f"{path.name} was built from other sources: install burnish again"
    return None, reason


def _declare(functions: ctypes.CDLL) -> None:
    pointer, number, wide, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "abi": (number, []),
        "size_of": (wide, [number]),
        "kernels": (text, [text]),
        "create": (pointer, [pointer, text, number, number, number]),
        "bytes": (wide, [pointer]),
        "run": (number, [pointer, pointer]),
        "destroy": (None, [pointer]),
        "pack_f32": (None, [pointer, number, number, wide, number, pointer]),
        "pack_bf16": (None, [pointer, number, number, wide, number, pointer]),
        "pack_bytes": (None, [pointer, number, number, wide, number, number, pointer]),
        "pack_nibbles": (None, [pointer, number, number, wide, number, pointer]),
        "linear": (
            number,
            [
                text,
                ctypes.POINTER(Linear),
                pointer,
                wide,
                number,
                number,
                number,
                ctypes.c_float,
                pointer,
                wide,
                pointer,
            ],
        ),
        "norm": (number, [text, ctypes.POINTER(Norm), pointer, pointer, number]),
        "activate": (number, [text, number, number, pointer, pointer, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(functions, f"burnish_{name}")
        function.restype = result
        function.argtypes = arguments
