"""Going on with a quantization that was interrupted: whether a folder holds one, and whether it is the same one.

Finished blocks live in OUT/.partial while it is under way; what they hold is decided in `compress/partial.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.partial import PartialFolder
from burnish.errors import ConfigError
from burnish.measure.json_values import to_plain
from burnish.pipeline.opening import Opened
from burnish.pipeline.resuming import run_environment
from burnish.train.checkpoints import first_difference

PARTIAL = ".partial"
RESUME = ("auto", "never")


def check_resume(resume: str) -> None:
    """Refuse what is neither "auto" nor "never".

    Raises:
        ConfigError: that.
    """
    if resume not in RESUME:
        raise ConfigError("--resume is not valid", got=repr(resume), expected=" or ".join(RESUME))


def is_unfinished(out: Path) -> bool:
    """The folder holds blocks of a quantization that did not come to its end."""
    return PartialFolder(out / PARTIAL).saved() is not None


def open_partial(
    out: Path,
    parent: Opened,
    config: QuantizeConfig,
    mixed: MixedPrecision | None,
    tokens: Sequence[Sequence[int]] | None,
    *,
    resume: str,
    notify: Callable[[str], None],
) -> PartialFolder:
    """The place for finished blocks, holding those that are there already. Those of another quantization are removed.

    Args:
        out: folder of the child.
        parent: what is quantized.
        config, mixed: what is asked for.
        tokens: calibration token ids.
        resume: "auto" or "never".
        notify: told what is gone on from, and what is not as it was.

    Raises:
        ConfigError: "auto", and what is there was made of something else or otherwise.
    """
    identity = {
        "settings": to_plain(config) | {"mixed_precision": to_plain(mixed)},
        "parent": {
            "fingerprint": parent.as_input()["fingerprint"],
            "dtype": str(parent.decoder.dtype).removeprefix("torch."),
        },
        "calibration": fingerprint(tokens),
    }
    environment = run_environment(parent)
    partial = PartialFolder(out / PARTIAL, identity=identity, environment=environment)
    saved = partial.saved() if resume == "auto" else None
    if saved is None:
        partial.clear()
        return partial
    different = first_difference(saved.get("identity"), identity)
    if different is not None:
        name, before, now = different
        raise ConfigError(
            f"{partial.folder} belongs to a quantization with other {name}: {before} there, {now} here",
            remedy="Give what that one was given, or begin anew with --resume never --overwrite.",
        )
    blocks = partial.go_on()
    notify(f"going on after {blocks} of {parent.decoder.config.num_layers} blocks, from {partial.folder}")
    changed = first_difference(saved.get("environment"), environment)
    if changed is not None:
        notify(f"the last bits may differ from an uninterrupted run: {changed[0]} was {changed[1]}, is {changed[2]}")
    return partial


def fingerprint(tokens: Sequence[Sequence[int]] | None) -> str | None:
    """SHA-256 over all token ids and where each sequence ends; None for none."""
    if tokens is None:
        return None
    digest = hashlib.sha256()
    for row in tokens:
        digest.update(array("q", [len(row), *row]).tobytes())
    return digest.hexdigest()
