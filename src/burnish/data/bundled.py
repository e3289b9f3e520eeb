"""Where the files that ship inside the package are: the bundled base model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from burnish.errors import ConfigError

_ASSETS = Path(__file__).parent / "assets"

BUNDLED: dict[str, Path] = {"burnish-sql-base": _ASSETS / "burnish-sql-base"}


def bundled_path(name: str) -> Path:
    """Folder of a bundled model.

    Raises:
        ConfigError: no bundled model has this name, or its files are missing from this installation.
    """
    if name not in BUNDLED:
        close = get_close_matches(name, BUNDLED, n=1)
        raise ConfigError(
            f"no bundled model is named {name!r}",
            expected=", ".join(BUNDLED),
            remedy=f"Did you mean {close[0]}?" if close else None,
        )
    path = BUNDLED[name]
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"the bundled model {name} is missing from this installation",
            expected=f"its files in {path}",
            remedy="Install the package again",
        )
    return path
