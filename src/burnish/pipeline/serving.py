"""Opening what a user names for serving: names, fingerprints and checks here, the weights in the engine's process.

Torch-free, so that the process that answers HTTP stays small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.engine.shard_launch import launched_rank
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import CheckpointError, ConfigError
from burnish.models.hf_config import config_of, read_config, read_json_object
from burnish.models.resolve import resolve_model
from burnish.pipeline.manifest import MANIFEST_NAME, fingerprint_folder, read_manifest
from burnish.serve.service import Served, ServedModel


@dataclass(frozen=True, kw_only=True)
class ServedEngine:
    """`NativeEngine`'s options; it checks them."""

    dtype: str = "auto"
    device: str = "cpu"
    max_num_seqs: int = 32
    max_model_len: int | None = None
    max_batch_tokens: int | None = None
    memory: str | None = None
    kv_memory: str | None = None
    kv_dtype: str | None = None
    threads: int | None = None
    quantize: str = "none"
    weights_cache: bool = True
    speculation: str = "auto"
    revision: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


def follow_launched(engine: ServedEngine) -> None:
    """In a process that torchrun started as a follower: run its part for the engine of rank 0, and exit.

    Returns at once everywhere else.
    """
    if engine.tensor_parallel * engine.pipeline_parallel > 1 and launched_rank():
        from burnish.engine.shard_setup import open_group

        open_group(
            tensor_parallel=engine.tensor_parallel, pipeline_parallel=engine.pipeline_parallel, device=engine.device
        )


def open_served(
    model: str,
    engine: ServedEngine,
    *,
    name: str | None = None,
    adapters: Mapping[str, str] | None = None,
    base: str | None = None,
) -> Served:
    """Check what is to be served, and say how its engine is made; no weights are read yet.

    Args:
        model: folder, bundled name or hub id; an adapter's folder stands for its base, served with it.
        name: what clients call the model; None takes the folder's name, or the hub id.
        adapters: folders of LoRA adapters by the names that clients choose them with.
        base: the base of the adapter that `model` names, where it is not the recorded one.

    Raises:
        CheckpointError: a folder is missing or corrupt, or its tokenizer is not the one that it was made with.
        ConfigError: what is named does not fit together.
    """
    every = dict(adapters or {})
    if _is_adapter(model):
        own = _folder_name(model)
        if own in every:
            raise ConfigError(f"two adapters are called {own}", remedy="Name one of them with --adapter NAME=DIR.")
        every = {own: model, **every}
        model = base or _base_of(Path(model))
    elif base is not None:
        raise ConfigError("a base was given, but the model is no adapter", got=f"model {model}, base {base}")
    folder = resolve_model(model, revision=engine.revision, offline=engine.offline, allow_pickle=engine.allow_pickle)
    config = config_of(read_config(folder))
    tokenizer = load_tokenizer(folder)
    check_tokens(folder, tokenizer)
    own = name or _name_of(model, folder)
    models = [ServedModel(name=own, root=model, fingerprint=fingerprint_folder(folder))]
    for adapter, path in every.items():
        if not _is_adapter(path):
            raise CheckpointError(f"{path} is no adapter", expected="a folder with adapter_config.json")
        check_tokens(Path(path), tokenizer)
        fingerprint = fingerprint_folder(Path(path))
        models.append(ServedModel(name=adapter, root=path, fingerprint=fingerprint, adapter=adapter, parent=own))
    return Served(
        models=tuple(models),
        make_engine=_maker(model, engine, {name: str(Path(path).resolve()) for name, path in every.items()}),
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
    )


def check_tokens(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Hold a tokenizer against the manifest of an artifact that was made with it.

    A model that is served with other tokens or another chat template than it was trained with answers badly, and
    nothing else would say so.

    Raises:
        CheckpointError: the golden text gives other ids, or the chat template is another one.
    """
    manifest = read_manifest(folder)
    if manifest is None or not isinstance(manifest.get("golden_tokens"), Mapping):
        return
    remedy = f"Bring the tokenizer's files back, or remove {MANIFEST_NAME} if the change is meant."
    golden = manifest["golden_tokens"]
    text, recorded = golden.get("text"), golden.get("ids")
    if not isinstance(text, str) or not isinstance(recorded, list):
        raise CheckpointError(f"{folder / MANIFEST_NAME}: golden_tokens is malformed", expected="text and ids")
    if tokenizer is None:
        raise CheckpointError(f"{folder} was made with a tokenizer, and there is none now", remedy=remedy)
    ids = tokenizer.encode(text)
    if ids != recorded:
        place = next(
            (i for i, pair in enumerate(zip(ids, recorded)) if pair[0] != pair[1]), min(len(ids), len(recorded))
        )
        raise CheckpointError(
            f"{folder} was made with another tokenizer: the golden text of {MANIFEST_NAME} gives other ids",
            got=f"{ids[place : place + 4]} at token {place}",
            expected=recorded[place : place + 4],
            remedy=remedy,
        )
    if "chat_template" in manifest and manifest["chat_template"] != tokenizer.chat_template:
        raise CheckpointError(f"{folder} was made with another chat template than its tokenizer has now", remedy=remedy)


def _maker(model: str, engine: ServedEngine, adapters: Mapping[str, str]) -> Callable[[], Any]:
    return functools.partial(make_served_engine, model, engine, dict(adapters))


def make_served_engine(model: str, options: ServedEngine, adapters: Mapping[str, str]) -> Any:
    """The engine itself, in the process that runs it."""
    from burnish.engine.native import NativeEngine

    given = {name: value for name, value in asdict(options).items() if value is not None}
    return NativeEngine(model, adapters=adapters, **given)


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def _base_of(adapter: Path) -> str:
    base = read_json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter} does not name its base", remedy="Name the base with --base.")
    return str(base)


def _folder_name(path: str) -> str:
    return Path(path).resolve().name


def _name_of(model: str, folder: Path) -> str:
    return folder.resolve().name if Path(model).is_dir() else model.partition("@")[0]
