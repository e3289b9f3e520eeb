"""From what a user calls a model to the folder that holds it. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from burnish.errors import CheckpointError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
# Copies in another layout, and folders of other formats, would only cost time and disk.
_HUB_IGNORED = ("*/*", "consolidated*")


def resolve_model(
    name: str | Path, *, revision: str | None = None, offline: bool = False, allow_pickle: bool = False
) -> Path:
    """The folder of a model: a local folder, a bundled model's name, or a hub id, downloaded when needed.

    Args:
        name: a path, a bundled name, `org/name` or `org/name@revision`.
        revision: branch, tag or commit of the hub repository; also after an "@".
        offline: use what an earlier download left, and fail otherwise.
        allow_pickle: also download pytorch_model.bin files.

    Raises:
        CheckpointError: there is no such folder, or the hub cannot provide it.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file", expected="a model folder", remedy=f"Give its folder: {path.parent}")
    text = str(name)
    bundled = _bundled_folder(text)
    if bundled is not None:
        return bundled
    hub_id, _, at_revision = text.partition("@")
    if not _HUB_ID.match(hub_id) or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{text} is no model", expected="a model folder, burnish-sql-base, or a hub id like org/name"
        )
    return _download(hub_id, revision or at_revision or None, offline=offline, allow_pickle=allow_pickle)


def _bundled_folder(name: str) -> Path | None:
    from burnish.data.bundled import BUNDLED, bundled_path

    return bundled_path(name) if name in BUNDLED else None


def _download(hub_id: str, revision: str | None, *, offline: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_HUB_FILES, *(("pytorch_model*.bin",) if allow_pickle else ())]
    label = hub_id if revision is None else f"{hub_id}@{revision}"
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_HUB_IGNORED),
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as error:
        remedy = "Run once without --offline." if offline else "Is the network there?"
        raise CheckpointError(f"{label} is not a local folder and not in the hub's cache", remedy=remedy) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{label} cannot be downloaded from the hub: {reason}") from error
