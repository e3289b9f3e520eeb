"""The part of MLflow's client that a delivery needs. Nothing here prints, and nothing goes to MLflow's makers."""

from __future__ import annotations

import logging
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from burnish._optional import require
from burnish.track.destination import Destination, default_artifacts

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # One at once, for a connection that had been idle for too long; the sender has patience of its own for the rest.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_CONNECT_S = 5
_NOISY = ("mlflow", "alembic", "sqlalchemy", "urllib3")
_REASONS = (
    (("connection refused",), "connection refused"),
    (("failed to resolve", "name or service not known", "name resolution"), "no host of this name is known"),
    (("connecttimeout", "connect timeout", "read timed out", "timed out"), "no answer in time"),
    (("connection aborted", "connection reset", "remotedisconnected"), "the connection broke"),
)


class Mlflow:
    """One server, or one database.

    Raises:
        MissingExtraError: MLflow, or what it reaches the database with, is not installed.
        Exception: the place cannot be reached.
    """

    def __init__(self, destination: Destination) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", module="mlflow")
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if not destination.is_server:
            _probe(destination)
        require("mlflow", extra="track")
        from mlflow.tracking import MlflowClient

        for name in _NOISY:  # importing it has set them again
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.uri = destination.uri
        self.client = MlflowClient(tracking_uri=destination.uri, registry_uri=destination.uri)

    def experiment(self, destination: Destination) -> str:
        """The experiment's id; it is made where it is not there."""
        found = self.client.get_experiment_by_name(destination.experiment)
        if found is None:
            try:
                return self.client.create_experiment(
                    destination.experiment,
                    artifact_location=default_artifacts(destination),
                    tags={"mlflow.experimentKind": "custom_model_development"},  # which pages MLflow shows first
                )
            except Exception:
                found = self.client.get_experiment_by_name(destination.experiment)  # somebody else was first
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise RuntimeError(f"the experiment {destination.experiment} is deleted there; restore it or name another")
        return found.experiment_id

    def runs_with(self, experiment_id: str, tag: str, value: str) -> list[str]:
        """Runs that carry a tag, the oldest first."""
        found = self.client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=100)
        return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

    def create_run(self, experiment_id: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        """A run's id."""
        return self.client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=name).info.run_id

    def delete_run(self, run_id: str) -> None:
        """Put a run into MLflow's bin."""
        self.client.delete_run(run_id)

    def is_deleted(self, run_id: str) -> bool:
        """Somebody has deleted the run."""
        return self.client.get_run(run_id).info.lifecycle_stage != "active"

    def reopen_run(self, run_id: str) -> None:
        """A run that had ended goes on."""
        self.client.update_run(run_id, status="RUNNING")

    def end_run(self, run_id: str, status: str, end_ms: int) -> None:
        """FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status, end_ms)

    def has_ended(self, run_id: str, status: str, end_ms: int) -> bool:
        """The run has this end already."""
        info = self.client.get_run(run_id).info
        return (info.status, info.end_time) == (status, end_ms)

    def params(self, run_id: str) -> dict[str, str]:
        """All of a run's params."""
        return dict(self.client.get_run(run_id).data.params)

    def metric_places(self, run_id: str, name: str) -> set[tuple[int, int]]:
        """(step, milliseconds) of every value of a figure."""
        return {(one.step, one.timestamp) for one in self.client.get_metric_history(run_id, name)}

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One request; metrics are (name, value, milliseconds, step)."""
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, time, step) for name, value, time, step in metrics],
            params=[Param(name, value) for name, value in (params or {}).items()],
            tags=[RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def has_artifact(self, run_id: str, name: str, source: Path | None) -> bool:
        """The run has a file of this name, as large as `source`; a folder that is here is taken as changed."""
        there = {one.path: one.file_size for one in self.client.list_artifacts(run_id)}
        return name in there and (source is None or (source.is_file() and there[name] == source.stat().st_size))

    def upload(self, run_id: str, source: Path) -> None:
        """A file or a folder, under its own name; what is there under it is replaced."""
        if source.is_dir():
            self.client.log_artifacts(run_id, str(source), artifact_path=source.name)
        else:
            self.client.log_artifact(run_id, str(source))


def is_refusal(error: BaseException) -> bool:
    """The request itself is at fault: sending it again would not help."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def is_gone(error: BaseException) -> bool:
    """What was there before is not there."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def in_words(error: BaseException) -> str:
    """Why a place did not take something, in a line for people; what is not known is told as MLflow said it."""
    said = " ".join(str(error).split()) or type(error).__name__
    for signs, words in _REASONS:
        if any(sign in said.lower() for sign in signs):
            return words
    return textwrap.shorten(said, 300, placeholder=" ...")


def _probe(destination: Destination) -> None:
    """Connect once: MLflow itself would try for minutes."""
    if destination.uri.startswith("sqlite"):
        return
    if destination.driver:
        require(destination.driver, extra="track")
    from sqlalchemy import create_engine

    engine = create_engine(destination.uri, connect_args={"connect_timeout": _CONNECT_S})
    try:
        engine.connect().close()
    finally:
        engine.dispose()
