"""Opening several models beside each other for the page that compares them. Torch-free."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.errors import CheckpointError
from burnish.models.resolve import resolve_model
from burnish.pipeline.manifest import read_manifest
from burnish.pipeline.serving import ServedEngine, open_served
from burnish.plan.hardware import usable_cores
from burnish.serve.compare_models import ComparedModel
from burnish.serve.service import ServedModel, Service
from burnish.serve.settings import ServeSettings

_CHUNK_BYTES = 1 << 22
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def weights_digest(*folders: Path) -> str:
    """SHA-256 over everything in the weight files of a model's folder, and of the adapter's on it.

    Other than `manifest.fingerprint_folder` it reads every byte (about a second per GiB), so two models that differ in
    a single number never look alike. An adapter's settings count as well: its scale changes what it does.

    Raises:
        CheckpointError: a folder has no weights, or they cannot be read.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern))
        if not files:
            raise CheckpointError(f"{folder} has no weights", expected="safetensors files")
        for file in [*files, *folder.glob("adapter_config.json")]:
            _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: Any, file: Path) -> None:
    try:
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read", got=error.strerror or error) from error


def compared_models(service: Service, engine: ServedEngine, *, adapters_only: bool = False) -> list[ComparedModel]:
    """The columns of one service: its base and its adapters.

    Args:
        adapters_only: leave the base out where there are adapters.
    """
    models = service.served.models
    base = _folder(models[0].root, engine)
    chosen = models[1:] if adapters_only and len(models) > 1 else models
    return [_compared(model, base, service, engine) for model in chosen]


def open_compared(
    names: Sequence[str], engine: ServedEngine, settings: ServeSettings, *, say: Callable[[str], None]
) -> list[ComparedModel]:
    """One service for each of these models; an adapter's folder stands for its base with the adapter on it.

    Raises:
        CheckpointError, ConfigError: as `serving.open_served`.
    """
    found: list[ComparedModel] = []
    for name in names:
        served = open_served(name, engine)
        service = Service(served, settings, keys=None, say=say)
        found += compared_models(service, engine, adapters_only=True)
    return distinct_names(found)


def distinct_names(models: Sequence[ComparedModel]) -> list[ComparedModel]:
    """The same models, each with a name of its own: the folder above tells equal names apart, else a number does."""
    counts = Counter(model.name for model in models)
    longer = [_with_folder(model) if counts[model.name] > 1 else model.name for model in models]
    counts = Counter(longer)
    return [
        replace(model, name=f"{name} ({place})" if counts[name] > 1 else name)
        for place, (model, name) in enumerate(zip(models, longer), 1)
    ]


def _with_folder(model: ComparedModel) -> str:
    root = Path(model.model.root)
    return f"{root.resolve().parent.name}/{model.name}" if root.is_dir() else model.name


def threads_each(engines: int) -> int:
    """Threads for each of several engines that compute at once: they share the cores evenly."""
    return max(1, usable_cores() // engines)


def _compared(model: ServedModel, base: Path, service: Service, engine: ServedEngine) -> ComparedModel:
    folders = [base] if model.adapter is None else [base, Path(model.root)]
    tokenizer = service.served.tokenizer
    template = _recorded_template(folders)
    if template is None or (template == "chat" and (tokenizer is None or tokenizer.chat_template is None)):
        template = "chat" if tokenizer is not None and tokenizer.chat_template is not None else "plain"
    return ComparedModel(
        name=model.name,
        model=model,
        service=service,
        digest=weights_digest(*folders),
        template=template,
        quantize=engine.quantize,
    )


def _recorded_template(folders: Sequence[Path]) -> str | None:
    """What the newest of the folders to say so was trained with."""
    for folder in reversed(folders):
        manifest = read_manifest(folder)
        data = manifest.get("data") if manifest else None
        if isinstance(data, dict) and data.get("template") in ("chat", "alpaca", "sql-context", "plain"):
            return str(data["template"])
    return None


def _folder(model: str, engine: ServedEngine) -> Path:
    return resolve_model(model, revision=engine.revision, offline=engine.offline, allow_pickle=engine.allow_pickle)
