"""The GPU kernels run on the card where there is one, else under Triton's interpreter (see `tests/conftest.py`)."""

from __future__ import annotations

import pytest
import torch

from burnish.kernels.gpu.support import against


@pytest.fixture(scope="session")
def device() -> torch.device:
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = against(place, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return place
