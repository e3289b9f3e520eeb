"""What works on this machine: hardware, versions, extras, engines, bundled files. Imports none of what it looks for."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from burnish.data.bundled import BUNDLED
from burnish.plan import hardware

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 6)

# Extra -> the modules it brings.
EXTRAS = {
    "hf": ("transformers",),
    "data": ("datasets", "pyarrow"),
    "constrained": ("llguidance",),
    "gpu": ("triton",),
    "ct2": ("ctranslate2",),
    "dev": ("pytest", "hypothesis", "ruff", "sentencepiece"),
}
# Engine -> (module it needs, extra that brings the module); None for what is always there.
ENGINES: dict[str, tuple[str, str] | None] = {
    "native": None,
    "transformers": ("transformers", "hf"),
    "ctranslate2": ("ctranslate2", "ct2"),
    "openai:URL": None,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's.

    Attributes:
        group: "python", "hardware", "packages", "extras", "engines" or "files".
        name: what was looked at.
        status: "ok", "missing" (something optional), "warning" or "error" (burnish will not work).
        detail: what was found.
        remedy: what to do about it, where there is something to do.
    """

    group: str
    name: str
    status: str
    detail: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """The fields as JSON values."""
        return asdict(self)


def facts() -> list[Check]:
    """Look at everything; takes some milliseconds, and some hundred where nvidia-smi is asked."""
    return [*_python(), *_hardware(), *_packages(), *_extras(), *_engines(), *_files()]


def healthy(checks: list[Check]) -> bool:
    """Whether nothing is in the way of the core: no check is an error."""
    return all(check.status != "error" for check in checks)


def _python() -> Iterator[Check]:
    good = sys.version_info[:2] >= MIN_PYTHON
    yield Check(
        group="python",
        name="python",
        status="ok" if good else "error",
        detail=f"{platform.python_version()} at {sys.executable}",
        remedy=None if good else f"Use Python {'.'.join(map(str, MIN_PYTHON))} or newer.",
    )


def _hardware() -> Iterator[Check]:
    found = hardware.processor()
    sets = found.instruction_sets
    yield Check(
        group="hardware",
        name="processor",
        status="ok",
        detail=f"{found.name}, {found.cores} usable core{'s' if found.cores != 1 else ''}",
    )
    yield Check(
        group="hardware",
        name="memory",
        status="ok",
        detail=f"{found.memory_bytes / 2**30:.1f} GiB, {found.available_bytes / 2**30:.1f} GiB available",
    )
    fast = bool(sets)
    yield Check(
        group="hardware",
        name="instruction sets",
        status="ok" if fast else "warning",
        detail=", ".join(sets) or "none that burnish knows",
        remedy=None if fast else "Generic code will run; expect it to be slow.",
    )
    cards = hardware.cards()
    detail = ", ".join(f"{card.name} {card.memory_bytes / 2**30:.0f} GiB (driver {card.driver})" for card in cards)
    yield Check(group="hardware", name="NVIDIA cards", status="ok" if cards else "missing", detail=detail or "none")
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    yield Check(
        group="hardware",
        name="C++ compiler",
        status="ok" if compiler else "missing",
        detail=compiler or "none: it is needed only to build the CPU kernels",
    )
    yield _cpu_kernels(has_compiler=compiler is not None)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) != found.cores:
        yield Check(
            group="hardware",
            name="OMP_NUM_THREADS",
            status="warning",
            detail=f"{threads}, with {found.cores} usable cores",
            remedy="Unset it, or give --threads.",
        )


def _cpu_kernels(*, has_compiler: bool) -> Check:
    from burnish.kernels.cpu.library import describe

    found = describe()
    isa = found["isa"]
    if isa is None:
        reason = found["reason"] or "they were not built"
        remedy = "Install burnish again." if has_compiler else "Install g++ or clang++, then install burnish again."
        return Check(
            group="hardware",
            name="CPU kernels",
            status="missing",
            detail=f"none, plain torch code runs instead, and is slower: {reason}",
            remedy=None if found["compiled"] else remedy,
        )
    return Check(group="hardware", name="CPU kernels", status="ok", detail=f"{isa}, compiled at {found['path']}")


def _packages() -> Iterator[Check]:
    for package in ("burnish", "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub"):
        found = _version(package)
        status, remedy = ("ok", None) if found else ("error", "Install it with: pip install burnish")
        if package == "torch" and found and _release(found) < MIN_TORCH:
            status, remedy = "error", f"Install torch {'.'.join(map(str, MIN_TORCH))} or newer."
        yield Check(group="packages", name=package, status=status, detail=found or "not installed", remedy=remedy)


def _extras() -> Iterator[Check]:
    for extra, modules in EXTRAS.items():
        lacking = [module for module in modules if not _present(module)]
        yield Check(
            group="extras",
            name=extra,
            status="missing" if lacking else "ok",
            detail=f"lacks {', '.join(lacking)}" if lacking else ", ".join(modules),
            remedy=f"Install it with: pip install 'burnish[{extra}]'" if lacking else None,
        )


def _engines() -> Iterator[Check]:
    for engine, needs in ENGINES.items():
        works = needs is None or _present(needs[0])
        yield Check(
            group="engines",
            name=engine,
            status="ok" if works else "missing",
            detail="available" if works or needs is None else f"needs {needs[0]}",
            remedy=None if works or needs is None else f"Install it with: pip install 'burnish[{needs[1]}]'",
        )


def _files() -> Iterator[Check]:
    for name, folder in BUNDLED.items():
        weights = list(Path(folder).glob("*.safetensors"))
        complete = (Path(folder) / "config.json").is_file() and bool(weights)
        size = sum(path.stat().st_size for path in weights)
        yield Check(
            group="files",
            name=name,
            status="ok" if complete else "error",
            detail=f"{size / 1e6:.1f} MB at {folder}" if complete else f"not complete at {folder}",
            remedy=None if complete else "Install burnish again.",
        )


def _present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    digits = text.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in digits if part.isdigit())
