"""A model in MLflow: logged with its signature, registered, and loaded again without any pickled code.

What is stored is the model's folder as burnish writes it, beside an MLmodel file that names the module of burnish which
loads it. Where it is loaded burnish has to be installed; `requirements.txt` says so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from burnish.track.mlflow_api import Mlflow
from burnish.track.spool import files_of

KEY_TAG = "burnish.key"
LOADER = "burnish.pipeline.registered_model"
_READY = "READY"


def deliver_model(
    mlflow: Mlflow, event: Mapping[str, Any], source: Path | None, key: str, run_id: str, experiment_id: str
) -> Literal["sent", "there", "missing"]:
    """Log a folder as a model of a run, and register it.

    Each step looks first whether it is done, by the key that model and version carry as a tag.

    Args:
        event: `name`, and `registered`, the registered model's name or None.
        source: the folder; None where it is gone.
    """
    client = mlflow.client
    model = _only_model(client, experiment_id, key)
    done = model is not None and _status(model) == _READY
    if source is None and not done:
        return "missing"
    if model is None:
        made = client.create_logged_model(
            experiment_id,
            name=event["name"],
            source_run_id=run_id,
            tags={KEY_TAG: key},
            model_type="causal language model",
        )
        model = _only_model(client, experiment_id, key) or made
    if source is not None and not done:
        _log(mlflow, model, source, run_id)
    registered = event.get("registered")
    new = registered is not None and _register(mlflow, registered, model, key, run_id)
    return "there" if done and not new else "sent"


def _only_model(client: Any, experiment_id: str, key: str) -> Any:
    """The model that carries a key, or None; of several, which lost replies may have left, the first is kept."""
    found = client.search_logged_models([experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
    models = sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))
    for twice in models[1:]:
        client.delete_logged_model(twice.model_id)
    return models[0] if models else None


def _log(mlflow: Mlflow, model: Any, source: Path, run_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    client = mlflow.client
    # Beside the files, so that they can be linked.
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=source.parent if os.access(source.parent, os.W_OK) else None))
    try:
        write_model(folder / "model", source, model_id=model.model_id, run_id=run_id)
        client.log_model_artifacts(model.model_id, str(folder / "model"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outputs = client.get_run(run_id).outputs
    there = [] if outputs is None else [output.model_id for output in outputs.model_outputs]
    if model.model_id not in there:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, _READY)


def _register(mlflow: Mlflow, name: str, model: Any, key: str, run_id: str) -> bool:
    client = mlflow.client
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    if _is_registered(client, name, key, run_id):
        return False
    # Without a server MLflow would look for the model's id at the process's default place, not at this one.
    source = f"models:/{model.model_id}" if mlflow.uri.startswith("http") else model.artifact_location
    client.create_model_version(
        name,
        source=source,
        run_id=run_id,
        model_id=model.model_id,
        tags={KEY_TAG: key},
        await_creation_for=0,
    )
    _is_registered(client, name, key, run_id)
    return True


def _is_registered(client: Any, name: str, key: str, run_id: str) -> bool:
    """A version carries the key; of several the first is kept."""
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    versions = sorted((one for one in found if one.tags.get(KEY_TAG) == key), key=lambda one: int(one.version))
    for twice in versions[1:]:
        client.delete_model_version(name, twice.version)
    return bool(versions)


def write_model(folder: Path, source: Path, *, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write an MLflow model folder around a model's or an adapter's; its files are linked where that is possible."""
    from mlflow import pyfunc
    from mlflow.models import Model

    empty = folder.parent / "files"
    empty.mkdir()
    (empty / ".empty").touch()
    model = Model(model_uuid=model_id, model_id=model_id, run_id=run_id)
    pyfunc.save_model(
        str(folder),
        loader_module=LOADER,
        data_path=str(empty),
        mlflow_model=model,
        signature=signature(),
        pip_requirements=[f"burnish=={version('burnish')}"],
    )
    data = folder / model.flavors[pyfunc.FLAVOR_NAME][pyfunc.DATA]
    (data / ".empty").unlink()
    for file in files_of(source):
        target = data / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)


def signature() -> Any:
    """What a registered model takes and gives: rows with a prompt, rows with a text."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "text")]),
        params=ParamSchema(
            [
                ParamSpec("max_tokens", "long", 128),
                ParamSpec("temperature", "double", 0.0),
                ParamSpec("seed", "long", 0),
                ParamSpec("chat", "boolean", True),
            ]
        ),
    )


def _status(model: Any) -> str:
    return getattr(model.status, "value", str(model.status))
