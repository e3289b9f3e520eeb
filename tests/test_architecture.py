"""The house's rules, checked: floors, torch-free rooms, small files, no drawers for odds and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "burnish"
MAX_LINES = 400

TORCH_FREE = [
    "__init__.py",
    "errors.py",
    "_optional.py",
    "*/__init__.py",
    "plan/**/*.py",
    "track/**/*.py",
    "models/config.py",
    "models/families/**/*.py",
    "models/hf_config.py",
    "models/shapes.py",
    "models/shard_cut.py",
    "data/text_to_sql/**/*.py",
    "data/rows.py",
    "data/templates.py",
    "data/examples.py",
    "data/tokenizer.py",
    "data/bundled.py",
    "engine/block_manager.py",
    "engine/constrained.py",
    "engine/drafter.py",
    "engine/engine_options.py",
    "engine/ngram_*.py",
    "engine/openai_*.py",
    "engine/outputs.py",
    "engine/prompts.py",
    "engine/protocol.py",
    "engine/shard_launch.py",
    "engine/request.py",
    "engine/requests.py",
    "engine/rope_lengths.py",
    "engine/sampled.py",
    "engine/sampling.py",
    "engine/scheduler.py",
    "engine/sequence.py",
    "engine/step_clock.py",
    "engine/step_costs.py",
    "engine/supported.py",
    "engine/text_stream.py",
    "engine/tokenizer_folder.py",
    "kernels/cpu/library.py",
    "kernels/cpu/structs.py",
    "measure/report*.py",
    "pipeline/serving.py",
    "serve/**/*.py",
    "scale/**/*.py",
    "cli/command_queue.py",
    "cli/show_queue.py",
    "cli/main.py",
]

IMPORT_AND_LOOK = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = [module for module in ("torch", "transformers") if module in sys.modules]
    if heavy:
        raise SystemExit(f"{name} imports {', '.join(heavy)}")
print("clean")
"""


def source_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def torch_free_modules() -> list[str]:
    return sorted({module_name(path) for pattern in TORCH_FREE for path in SOURCE.glob(pattern)})


def test_floors_hold_for_every_import(repository: Path) -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the dev extra")
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [str(linter), "--no-cache"], cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_torch_free_modules_import_no_torch() -> None:
    modules = torch_free_modules()
    assert len(modules) > 10
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LOOK, *modules],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
    assert result.stdout.strip() == "clean"


def test_source_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    long = {str(path.relative_to(SOURCE)): lines for path, lines in lengths.items() if lines >= MAX_LINES}
    assert not long, f"split these: {long}"


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = [
        path for path in source_files() if path.stem.strip("_") in {"utils", "util", "helpers", "helper", "misc"}
    ]
    assert not drawers


def test_modules_say_what_they_hold() -> None:
    silent = [
        str(path.relative_to(SOURCE))
        for path in source_files()
        if not path.read_text(encoding="utf-8").lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent, f"no module docstring: {silent}"
