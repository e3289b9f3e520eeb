"""What every test gets: no network, one thread, and the way to the real inputs where they are present."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports torch or a Hugging Face library: they read these once, when they are imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
# Triton reads it when it is imported: without a card its interpreter runs the GPU kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/proc/driver/nvidia/version").exists() else "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is kept in the user's cache, for processes that tests start as well."""
    os.environ["BURNISH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Torch runs on one thread, even after a test that asked for more; a test without torch does not import it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout that the tests run from."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models, data sets and tokenizers, kept beside the repository and never shipped with it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real inputs are not here: {folder}")
    return folder
