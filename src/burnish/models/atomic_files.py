"""Files that are there whole or not at all: written under a temporary name, flushed, renamed. Torch-free."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.errors import CapacityError, CheckpointError


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name; errors as in `write_safetensors_folder`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing_to(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one line that names the path.

    Raises:
        CapacityError: no space is left.
        CheckpointError: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"no space left on the disk while writing {path}", remedy="Free some or choose another --out."
            ) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
