"""The OpenAPI document against the server: what fits is answered, what does not is refused, nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_process import ServingProcess

pytest.importorskip("schemathesis", reason="the extra dev brings it")
CASES = 15


@pytest.fixture(scope="module")
def small_server(_own_cache: None) -> Iterator[ServingProcess]:
    """Short answers, and room for all of them."""
    with ServingProcess("--max-model-len", "48", "--max-queue", "2000") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_undeclared_status_and_no_failure(small_server: ServingProcess, mode: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    command: list[Any] = [Path(sys.executable).with_name("schemathesis"), "run"]
    command += [f"{small_server.root}/openapi.json", "--mode", mode, "--max-examples", str(CASES), "--seed", "1"]
    command += ["--phases", "examples,fuzzing", "--generation-deterministic", "--no-color", "--request-timeout", "60"]
    command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
    command += ["--checks", "response_headers_conformance,response_schema_conformance"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert small_server.get("/ready").status_code == 200
    small_server.wait_for("burnish_kv_blocks_used", 0)
