"""Installing without a compiler, with one that knows less, and running with the kernels turned off."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.errors import ConfigError
from burnish.kernels.cpu import library as cpu_library

DOCTOR = """
import json
from burnish.kernels.cpu.library import describe, load
print(json.dumps([describe(), load() is None]))
"""
# Notes what it is asked for, refuses one flag, and otherwise makes an empty file of what it would have compiled.
COMPILER = """#!/bin/sh
echo "$*" >> {log}
case " $* " in *" {refused} "*) echo "unknown option {refused}" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def build(repository: Path, target: Path, compiler: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", target / "objects", "--build-lib", target],
        cwd=repository,
        env=os.environ | {"CXX": compiler, "CXXFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def make_compiler(folder: Path, *, refused: str) -> tuple[Path, Path]:
    """A stand-in and the file in which it notes its arguments, one call a line."""
    compiler, log = folder / "cxx", folder / "calls"
    compiler.write_text(COMPILER.format(log=log, refused=refused))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler, log


def ask(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_build_without_a_compiler_warns_and_goes_on(repository: Path, tmp_path: Path) -> None:
    done = build(repository, tmp_path, "/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels were not built; burnish will run on torch" in done.stderr
    assert "/nonexistent" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_build_with_a_compiler_that_lacks_amx_keeps_the_rest(repository: Path, tmp_path: Path) -> None:
    compiler, log = make_compiler(tmp_path, refused="-mamx-tile")
    done = build(repository, tmp_path, str(compiler))
    assert done.returncode == 0, done.stderr
    assert "not built" not in done.stderr
    assert len(list(tmp_path.rglob("_burnish_cpu*.so"))) == 1
    calls = log.read_text().splitlines()
    amx = [call for call in calls if "kernels_amx.cpp" in call]
    assert ["-mamx-tile" in call for call in amx] == [True, False]
    assert not any("-mavx512f" in call for call in amx[1:])
    assert sum("kernels_avx512.cpp" in call for call in calls) == 2
    # The last call links an object of each instruction set, the empty one included.
    for name in ("amx", "avx512_bf16", "avx512", "avx2", "kernels_generic", "api"):
        assert f"/{name}.o" in calls[-1]


def test_build_keeps_the_names_of_a_file_whose_instructions_are_unknown(repository: Path, tmp_path: Path) -> None:
    compiler, log = make_compiler(tmp_path, refused="-mavx512bf16")
    assert build(repository, tmp_path, str(compiler)).returncode == 0
    for name in ("/avx512_bf16.o", "/training_avx512_bf16.o"):
        calls = [call for call in log.read_text().splitlines() if name in call and "-c" in call.split()]
        assert len(calls) == 2
        assert "-DBURNISH_ISA=avx512_bf16" in calls[1]
        assert "-mavx512f" not in calls[1]


def test_build_whose_plain_part_fails_warns_and_leaves_no_library(repository: Path, tmp_path: Path) -> None:
    compiler, _ = make_compiler(tmp_path, refused="-shared")
    done = build(repository, tmp_path, str(compiler))
    assert done.returncode == 0
    assert "unknown option -shared" in done.stderr
    assert not list(tmp_path.rglob("*.so*"))


def test_turned_off_kernels_say_so() -> None:
    done = ask(DOCTOR, BURNISH_CPU_KERNELS="off")
    assert done.returncode == 0, done.stderr
    assert '"isa": null' in done.stdout
    assert done.stdout.strip().endswith("true]")


def test_missing_library_is_told_with_its_reason(tmp_path: Path) -> None:
    """A copy of the package as an installation without a compiler leaves it."""
    source = Path(cpu_library.__file__).parents[2]
    package = tmp_path / "burnish"
    package.mkdir()
    for path in source.iterdir():
        if path.name != "kernels":
            (package / path.name).symlink_to(path)
    kernels = package / "kernels" / "cpu"
    kernels.mkdir(parents=True)
    (package / "kernels" / "__init__.py").touch()
    for path in (source / "kernels" / "cpu").glob("*.py"):
        (kernels / path.name).symlink_to(path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){DOCTOR}"
    done = ask(code + "from burnish.plan.doctor import _cpu_kernels\nprint(_cpu_kernels(has_compiler=False))")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was there when burnish was installed" in done.stdout
    assert '"compiled": false' in done.stdout
    assert "status='missing'" in done.stdout
    assert "Install g++ or clang++, then install burnish again." in done.stdout


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_named_library_that_does_not_load_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.so"
    if content is not None:
        path.write_bytes(content)
    done = ask("from burnish.kernels.cpu.library import load; load()", BURNISH_CPU_LIBRARY=str(path))
    assert done.returncode != 0
    assert "ConfigError: the CPU kernels that BURNISH_CPU_LIBRARY names cannot be used: mine.so" in done.stderr


def test_named_library_is_taken_in_place_of_the_installed(tmp_path: Path) -> None:
    installed = cpu_library.describe()["path"]
    if installed is None:
        pytest.skip("no compiled kernels here")
    path = tmp_path / "mine.so"
    path.write_bytes(Path(str(installed)).read_bytes())
    done = ask(DOCTOR, BURNISH_CPU_LIBRARY=str(path))
    assert str(path) in done.stdout, done.stderr


def test_unknown_kernels_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown CPU kernels"):
        cpu_library.load("avx1024")
