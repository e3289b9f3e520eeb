"""The notebook runs as it is, and what is committed is a whole run of it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

_MISSING = [name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None]


@pytest.fixture
def notebook(repository: Path) -> Any:
    if _MISSING and os.environ.get("BURNISH_REQUIRE_SERVICES") == "1":
        pytest.fail(f"not installed: {', '.join(_MISSING)}")
    if _MISSING:
        pytest.skip(f"not installed: {', '.join(_MISSING)}")
    import nbformat

    found = nbformat.read(repository / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(found)
    return found


def said(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def drawings(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def accuracies(text: str) -> dict[str, float]:
    """Of "merged   83.3%  (95 % between ...)": the name and the share."""
    lines = [line.split() for line in text.splitlines() if "% between" in line]
    return {words[0]: float(words[1].rstrip("%")) / 100 for words in lines}


def check(notebook: Any) -> None:
    text = said(notebook)
    scores = accuracies(text)
    assert list(scores) == ["base", "merged", "gptq-4bit"]
    assert scores["base"] < 0.2
    assert scores["merged"] > 0.5
    assert scores["gptq-4bit"] > 0.5
    assert "merge: pass" in text
    assert "4 bits: pass" in text
    assert "  right: [('lithium', 3), ('nickel', 5), ('silver', 1)]" in text
    assert drawings(notebook) == 2


def test_the_committed_notebook_was_run_from_first_to_last(notebook: Any) -> None:
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check(notebook)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_the_notebook_executes(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, startup_timeout=600, resources=where).execute()
    check(notebook)
    assert not list(tmp_path.glob("burnish-*")), "the notebook leaves its folder behind"
