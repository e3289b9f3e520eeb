"""The compiled kernels on each instruction set that runs here."""

from __future__ import annotations

import pytest

from burnish.kernels.cpu import library as cpu_library
from burnish.kernels.cpu.library import ISAS, CpuLibrary


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    """The kernels of each instruction set in turn; skips those that were not built or do not run here."""
    if request.param not in cpu_library.available_isas():
        pytest.skip(f"no {request.param} kernels here ({cpu_library.describe()['reason'] or 'not this processor'})")
    loaded = cpu_library.load(request.param)
    assert loaded is not None
    return loaded
