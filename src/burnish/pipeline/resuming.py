"""Going on with a tuning run that was interrupted: whether a folder holds one, and whether it is the same run.

Checkpoints live in OUT/checkpoints while a run is under way. What they hold is decided in `train/state.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish import __version__
from burnish.errors import ConfigError
from burnish.measure.json_values import to_plain
from burnish.pipeline.manifest import MANIFEST_NAME, read_manifest
from burnish.pipeline.opening import Opened
from burnish.pipeline.runs import RUN_NAME
from burnish.pipeline.step_log import LOG_NAME
from burnish.pipeline.training_data import Row, TrainingData
from burnish.pipeline.tune_watch import TRACE_NAME
from burnish.train.checkpoints import Checkpoint, CheckpointFolder, find_checkpoint, first_difference
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from burnish.train.precision import resolve_precision

CHECKPOINTS = "checkpoints"
FREE_SETTINGS = ("max_seconds", "max_bad_steps", "save_every", "keep_last")  # may be others when a run goes on
_RUN_FILES = {CHECKPOINTS, LOG_NAME, TRACE_NAME, RUN_NAME}


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """What a run does with checkpoints that are there, and with its own at the end.

    Attributes:
        resume: "auto" goes on with the unfinished run that the output folder holds, if it holds one; "never" begins
            anew; a path goes on from that checkpoint, or from the newest in that folder.
        keep_checkpoints: leave them where they are when the run has come to its end, and write a last one.
    """

    resume: str = "auto"
    keep_checkpoints: bool = False


def is_unfinished(out: Path) -> bool:
    """The folder holds a run of ours that was interrupted or killed, and nothing newer."""
    if not out.is_dir():
        return False
    folder = CheckpointFolder(out / CHECKPOINTS)
    names = {path.name for path in out.iterdir()}
    if CHECKPOINTS in names and not folder.is_ours():
        return False
    manifest = read_manifest(out)
    if manifest is None:
        killed_early = bool(names) and all(name in _RUN_FILES or name.endswith(".tmp") for name in names)
        return killed_early or bool(folder.steps())
    if not folder.steps():
        return False
    if (manifest.get("figures") or {}).get("stopped") == "interrupted":
        return True
    newest = folder.place(folder.steps()[-1])
    return newest.stat().st_mtime > (out / MANIFEST_NAME).stat().st_mtime


def check_folder(out: Path, options: ResumeConfig, *, overwrite: bool) -> None:
    """Say plainly what a folder holds that is not to be written into.

    Raises:
        ConfigError: a finished run, or an unfinished one that is not to be resumed.
    """
    if overwrite:
        return
    if is_unfinished(out):
        if options.resume == "never":
            raise ConfigError(
                f"--out {out} holds an unfinished run",
                remedy="Leave --resume never out to go on with it, add --overwrite to begin anew, or choose another "
                "--out.",
            )
        return
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None or manifest.get("kind") not in ("adapter", "tuned"):
        return
    figures = manifest.get("figures") or {}
    steps = len(figures.get("steps") or [])
    base = (manifest.get("inputs") or {}).get("base", {}).get("path", "a model")
    onwards = f"burnish merge {out} --out DIR" if manifest["kind"] == "adapter" else f"burnish chat {out}"
    what = f"{figures.get('method', manifest['kind'])} on {base}, steps taken: {steps}"
    raise ConfigError(
        f"--out {out} holds a run that is over: {what} ({figures.get('stopped', 'finished')})",
        remedy=f"Use it ({onwards}), train again in its place with --overwrite, or choose another --out; to train it "
        "further, tune the merged model.",
    )


def unfinished_checkpoint(out: Path, options: ResumeConfig) -> Checkpoint | None:
    """The checkpoint that `open_checkpoints` would go on from, if any."""
    if options.resume == "auto":
        return CheckpointFolder(out / CHECKPOINTS).newest() if is_unfinished(out) else None
    return None if options.resume == "never" else find_checkpoint(options.resume)


def open_checkpoints(
    out: Path,
    options: ResumeConfig,
    *,
    identity: dict[str, Any],
    environment: dict[str, Any],
    notify: Callable[[str], None],
) -> tuple[CheckpointFolder, Checkpoint | None]:
    """The run's folder for checkpoints, and the one to go on from, if any. Checkpoints of another run are removed.

    Args:
        out: the run's output folder.
        identity: of `run_identity`.
        environment: of `run_environment`.
        notify: told what is gone on from, and what is not as it was.

    Raises:
        ConfigError: the checkpoint belongs to another run, or there is none where one was named.
        CheckpointError: the one that was named is damaged.
    """
    folder = CheckpointFolder(
        out / CHECKPOINTS,
        identity=identity,
        environment=environment,
        save_at_end=options.keep_checkpoints,
        notify=notify,
    )
    found: Checkpoint | None = None
    if options.resume == "auto":
        found = folder.newest() if is_unfinished(out) else None
    elif options.resume != "never":
        found = find_checkpoint(options.resume, notify=notify)
        if found is None:
            raise ConfigError(f"--resume {options.resume} holds no checkpoint", expected="auto, never or a checkpoint")
    if found is not None:
        different = first_difference(found.identity, identity)
        if different is not None:
            name, saved, now = different
            raise ConfigError(
                f"{found.path} belongs to a run with another {name.removeprefix('train.')}: {saved} there, {now} here",
                remedy="Give what that run was given, or begin anew with --resume never --overwrite.",
            )
        notify(f"going on after step {found.step}, from {found.path}")
        changed = first_difference(found.environment, environment)
        if changed is not None:
            notify(
                f"the last bits may differ from an uninterrupted run: {changed[0]} was {changed[1]}, is {changed[2]}"
            )
    elif folder.steps() and options.resume == "auto" and is_unfinished(out):
        notify(f"no checkpoint in {folder.path} is whole: beginning anew")
    if found is None or found.path.absolute().parent != folder.path.absolute():
        folder.clear()
    return folder, found


def run_identity(opened: Opened, rows: TrainingData, config: TrainConfig, lora: LoraConfig | None) -> dict[str, Any]:
    """Everything given that decides what a run comes to, as plain JSON.

    Args:
        opened: the model as it is trained.
        lora: None where no adapter is trained.
    """
    settings = {name: value for name, value in to_plain(config).items() if name not in FREE_SETTINGS}
    return {
        "train": settings,
        "lora": to_plain(lora),
        "precision": resolve_precision(opened.decoder, config),
        "base": {
            "fingerprint": opened.as_input()["fingerprint"],
            "dtype": str(opened.decoder.dtype).removeprefix("torch."),
        },
        "data": {"template": rows.template, "examples": _fingerprint(rows.examples)},
        "evaluation data": None if rows.evaluation is None else _fingerprint(rows.evaluation),
    }


def run_environment(opened: Opened) -> dict[str, Any]:
    """What may change the last bits of a run, as plain JSON."""
    device = opened.decoder.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "burnish": __version__,
    }


def _fingerprint(examples: Sequence[Row]) -> str:
    """SHA-256 over all tokens and labels; over the rows' lengths and content keys where the rows are on disk."""
    digest = hashlib.sha256()
    keys, lengths = getattr(examples, "keys", None), getattr(examples, "lengths", None)
    if keys is not None and lengths is not None:
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(keys).tobytes())
        return digest.hexdigest()
    for example in examples:
        digest.update(array("q", [len(example.tokens), *example.tokens, *example.labels]).tobytes())
    return digest.hexdigest()
