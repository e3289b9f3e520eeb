"""From what `--track` is given to a tracker."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from burnish.errors import ConfigError
from burnish.track.destination import EXPECTED as MLFLOW_URIS
from burnish.track.destination import is_mlflow, parse_destination
from burnish.track.guarded import GuardedTracker, TrackingWarning
from burnish.track.jsonl import JsonlTracker
from burnish.track.mlflow_tracker import MlflowTracker
from burnish.track.null import NullTracker
from burnish.track.protocol import Tracker
from burnish.track.wandb_tracker import WandbTracker

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_EXPECTED = "none, a path that ends in .jsonl, jsonl:PATH, wandb://PROJECT[/RUN], or of MLflow " + MLFLOW_URIS


def make_tracker(
    uri: str | None,
    *,
    beside: str | Path | None = None,
    warn: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Tracker:
    """The tracker of a URI, guarded so that its failures never reach the run.

    Args:
        uri: None, "" or "none" for no tracking; `jsonl:PATH`, `file://PATH` or a path that ends in `.jsonl`;
            `wandb://PROJECT` or `wandb://PROJECT/RUN`; for MLflow see `destination.parse_destination`.
        beside: what the run writes, beside which a tracker keeps what it could not send yet.
        warn: takes the lines that say what failed; a Python warning by default.
        say: takes the line that says where the run is to be seen; `warn` by default.

    Raises:
        ConfigError: the URI is of no kind that is known here. That is a mistake in the command, so it is not held back.
        MissingExtraError: the tracker's package is not installed.
    """
    if uri is None or uri in ("", "none"):
        return NullTracker()
    if is_mlflow(uri):
        place = None if beside is None else Path(beside)
        warn = warn or _warn
        tracker = MlflowTracker(parse_destination(uri), beside=place, warn=warn, say=say or warn)
        return GuardedTracker(tracker, warn=warn)
    if uri.startswith("wandb:"):
        return GuardedTracker(_wandb_tracker(uri), warn=warn)
    return GuardedTracker(JsonlTracker(_jsonl_path(uri)), warn=warn)


def _warn(line: str) -> None:
    warnings.warn(line, TrackingWarning, stacklevel=4)


def _wandb_tracker(uri: str) -> WandbTracker:
    place = urlsplit(uri)
    names = [unquote(name) for name in (place.netloc, *place.path.strip("/").split("/")) if name]
    if not place.netloc or len(names) > 2 or place.query or place.fragment:
        raise ConfigError(f"{uri!r} names no run of W&B", expected="wandb://PROJECT or wandb://PROJECT/RUN")
    return WandbTracker(names[0], names[1] if len(names) == 2 else None)


def _jsonl_path(uri: str) -> Path:
    if uri.startswith("jsonl:"):
        rest = uri.removeprefix("jsonl:")
        path = unquote(urlsplit(uri).path) if rest.startswith("//") else rest
        host = urlsplit(uri).netloc if rest.startswith("//") else ""
    elif uri.startswith("file:"):
        path, host = unquote(urlsplit(uri).path), urlsplit(uri).netloc
    elif uri.endswith(".jsonl") and not _SCHEME.match(uri):
        path, host = uri, ""
    else:
        raise ConfigError(f"{uri!r} names no tracker", expected=_EXPECTED)
    if not path or host not in ("", "localhost"):
        raise ConfigError(f"{uri!r} names no local file", expected=_EXPECTED)
    return Path(path).expanduser()
