from __future__ import annotations

from pathlib import Path

import pytest

from burnish.data import bundled
from burnish.data.bundled import BUNDLED, bundled_path
from burnish.errors import ConfigError


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"expected burnish-sql-base. Did you mean burnish-sql-base\?"):
        bundled_path("burnish-sql")


def test_missing_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "BUNDLED", {"burnish-sql-base": tmp_path})
    with pytest.raises(ConfigError, match="missing from this installation"):
        bundled_path("burnish-sql-base")
    (tmp_path / "config.json").write_text("{}")
    assert bundled_path("burnish-sql-base") == tmp_path


def test_bundled_folders_are_inside_the_package() -> None:
    assert all("burnish" in path.parts and "assets" in path.parts for path in BUNDLED.values())
