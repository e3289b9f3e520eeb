"""Where MLflow is to be reached, and how a run is to be called there: what an MLflow URI of `--track` says."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from burnish.errors import ConfigError

EXPECTED = "mlflow, http(s)://HOST[:PORT], mlflow+http(s)://..., sqlite:///FILE, mysql://... or postgresql://..."
_KNOWN = re.compile(r"^(mlflow\+)?(https?|sqlite|mysql|mariadb|postgresql)(\+\w+)?:")
_DRIVERS = {"mysql": "mysql+pymysql", "mariadb": "mysql+pymysql", "postgresql": "postgresql+psycopg"}
_OURS = ("experiment", "run", "model", "artifacts", "wait", "system")
_DEFAULT_EXPERIMENT = "burnish"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """An MLflow server, or a database that is used without one.

    Attributes:
        uri: as MLflow takes it, with its password.
        experiment: where runs go; made if it is not there.
        run: the run's name; None takes the name that the stage gives.
        model: what models are registered as; "none" sends no models; None takes the experiment's and the folder's name.
        artifacts: where a new experiment's files go, such as s3://BUCKET/PATH; None leaves it to the server.
        wait_s: longest that the end of a run waits for what is still to be sent.
        system_s: seconds between two readings of processor, memory and cards; 0 for none.
    """

    uri: str
    experiment: str = _DEFAULT_EXPERIMENT
    run: str | None = None
    model: str | None = None
    artifacts: str | None = None
    wait_s: float = 30.0
    system_s: float = 10.0

    @property
    def is_server(self) -> bool:
        """It is reached over HTTP."""
        return self.uri.startswith("http")

    @property
    def shown(self) -> str:
        """The URI without its password."""
        return without_password(self.uri)

    @property
    def name(self) -> str:
        """Short, the same for the same place, for names of files."""
        return hashlib.sha256(f"{self.shown}\n{self.experiment}".encode()).hexdigest()[:12]

    @property
    def stored(self) -> str:
        """The whole of it as a URI without its password, from which `parse_destination` makes it again."""
        options = {"experiment": self.experiment, "run": self.run, "model": self.model, "artifacts": self.artifacts}
        given = {name: value for name, value in options.items() if value is not None}
        return f"{self.shown}{'&' if '?' in self.shown else '?'}{urlencode(given, quote_via=quote)}"

    @property
    def driver(self) -> str | None:
        """The package that reaches the database."""
        return self.uri.partition("://")[0].partition("+")[2] or None

    def url_of(self, experiment_id: str, run_id: str) -> str | None:
        """The run's page; None without a server."""
        return f"{self.shown.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if self.is_server else None


def is_mlflow(uri: str) -> bool:
    """The URI is of a kind that goes to MLflow."""
    return uri == "mlflow" or _KNOWN.match(uri) is not None


def parse_destination(uri: str, *, experiment: str | None = None) -> Destination:
    """Read an MLflow URI; what follows `?` chooses names: experiment, run, model, artifacts, wait, system.

    "mlflow" stands for MLFLOW_TRACKING_URI. Where the URI names no experiment it is `experiment`, else that of
    MLFLOW_EXPERIMENT_NAME.

    Raises:
        ConfigError: it is malformed, or an option is not known.
    """
    if uri == "mlflow":
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not is_mlflow(uri) or uri == "mlflow":
            raise ConfigError("MLFLOW_TRACKING_URI names no place", got=repr(uri), expected=EXPECTED)
    if not is_mlflow(uri):
        raise ConfigError(f"{without_password(uri)} names no MLflow", expected=EXPECTED)
    try:
        parts = urlsplit(uri.removeprefix("mlflow+"))
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{without_password(uri)} is malformed", got=error, expected=EXPECTED) from error
    kind, _, driver = parts.scheme.partition("+")
    server = kind in ("http", "https")
    if (driver and server) or (kind != "sqlite" and not host):
        raise ConfigError(f"{without_password(uri)} names no place to track to", expected=EXPECTED)
    ours: dict[str, str] = {}
    theirs: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _OURS:
            ours[name] = value
        elif server:
            close = get_close_matches(name, _OURS, n=1)
            raise ConfigError(
                f"--track has an unknown option {name}",
                expected=None if close else ", ".join(_OURS),
                remedy=f"Did you mean {close[0]}?" if close else None,
            )
        else:
            theirs.append((name, value))
    if empty := next((name for name, value in ours.items() if not value), None):
        raise ConfigError(f"--track: {empty} is empty")
    scheme = parts.scheme if driver else _DRIVERS.get(kind, kind)
    path = parts.path.rstrip("/") if server else parts.path
    if kind == "sqlite":
        path = _database_file(uri, parts.netloc, path)
    artifacts = ours.get("artifacts")
    if artifacts is not None and "://" not in artifacts:
        artifacts = Path(artifacts).expanduser().resolve().as_uri()
    query = urlencode(theirs, quote_via=quote)
    made = f"sqlite:///{path}" + (f"?{query}" if query else "") if kind == "sqlite" else None
    named = ours.get("experiment") or experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return Destination(
        uri=made or urlunsplit((scheme, parts.netloc, path, query, "")),
        experiment=named or _DEFAULT_EXPERIMENT,
        run=ours.get("run"),
        model=ours.get("model"),
        artifacts=artifacts,
        wait_s=_seconds(ours, "wait", 30.0),
        system_s=_seconds(ours, "system", 10.0),
    )


def without_password(uri: str) -> str:
    """The URI as it may be shown and stored."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1@", uri)


def default_artifacts(destination: Destination) -> str | None:
    """Where files go when a database is used without a server and nothing else was said; an absolute place."""
    if destination.artifacts is not None or destination.is_server:
        return destination.artifacts
    if destination.uri.startswith("sqlite:///"):
        file = Path(unquote(destination.uri.removeprefix("sqlite:///").partition("?")[0]))
        return (file.parent / "mlartifacts").absolute().as_uri()
    return Path("mlartifacts").absolute().as_uri()


def _database_file(uri: str, host: str, path: str) -> str:
    """The file of a SQLite URI, absolute: three slashes begin a relative path, four an absolute one."""
    file = path.removeprefix("/")
    if host or not file or file.endswith("/"):
        raise ConfigError(f"{uri} names no file", expected="sqlite:///FILE")
    return str(Path(file).absolute())


def _seconds(given: dict[str, str], name: str, default: float) -> float:
    if name not in given:
        return default
    try:
        value = float(given[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 86400:
        raise ConfigError(f"--track: {name} is out of range", got=given[name], expected="0 to 86400 seconds")
    return value
