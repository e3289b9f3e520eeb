"""Builds the CPU kernels; everything else about the package stands in pyproject.toml.

The library has no tie to Python's or torch's ABI: it is plain C, loaded with ctypes. Each instruction set's file is
compiled with its own flags, and the best one is picked at run time. Without a compiler the package installs all the
same and runs on torch.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/burnish/kernels/cpu/csrc")
COMMON = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -pthread".split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mprefer-vector-width=512".split()
BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# (source, object, flags). A file whose flags the compiler does not know is compiled without them, and is then empty.
X86 = [
    ("kernels_avx2", "avx2", "-mavx2 -mfma -mf16c".split()),
    ("kernels_avx512", "avx512", AVX512),
    ("kernels_avx512", "avx512_bf16", [*BF16, "-DBURNISH_ISA=avx512_bf16"]),
    ("kernels_amx", "amx", AMX),
    ("training_avx2", "training_avx2", "-mavx2 -mfma -mf16c".split()),
    ("training_avx512", "training_avx512", AVX512),
    ("training_avx512", "training_avx512_bf16", [*BF16, "-DBURNISH_ISA=avx512_bf16"]),
    ("training_amx", "training_amx", AMX),
]
PLAIN = [
    "kernels_generic",
    "dispatch",
    "pack",
    "team",
    "sharing",
    "runtime",
    "api",
    "training_generic",
    "training_api",
    "quantize_api",
]


class BuildKernels(build_ext):
    """One shared library from objects with different flags."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or str(error).encode()
            print(
                "warning: the CPU kernels were not built; burnish will run on torch, slower.\n"
                + detail.decode(errors="replace")[-2000:],
                file=sys.stderr,
            )

    def _build(self, target: Path) -> None:
        compiler = os.environ.get("CXX", "c++")
        extra = os.environ.get("CXXFLAGS", "").split()
        objects = Path(self.build_temp).absolute()
        objects.mkdir(parents=True, exist_ok=True)
        on_x86 = platform.machine() in ("x86_64", "AMD64")
        # Elsewhere these are empty; what names a file's symbols stays.
        isas = [(source, name, flags if on_x86 else _names(flags)) for source, name, flags in X86]
        jobs = [*((source, name, flags, True) for source, name, flags in isas), *((f, f, [], False) for f in PLAIN)]

        def compile_one(job: tuple[str, str, list[str], bool]) -> str:
            source, name, flags, optional = job
            command = [
                compiler,
                *COMMON,
                *extra,
                "-c",
                str(SOURCES / f"{source}.cpp"),
                "-o",
                str(objects / f"{name}.o"),
            ]
            # What names the file's symbols must stay, whatever the compiler knows of the instructions.
            bare = _names(flags)
            try:
                subprocess.run([*command, *flags], check=True, capture_output=True)
            except subprocess.CalledProcessError:
                if not optional:
                    raise
                subprocess.run([*command, *bare], check=True, capture_output=True)
            return str(objects / f"{name}.o")

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            files = list(pool.map(compile_one, jobs))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        subprocess.run(
            [compiler, *extra, "-shared", "-pthread", *files, "-o", str(fresh)], check=True, capture_output=True
        )
        fresh.replace(target)


def _names(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag.startswith("-D")]


setup(
    ext_modules=[
        Extension("burnish.kernels.cpu._burnish_cpu", [str(SOURCES / f"{name}.cpp") for name in PLAIN], optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
