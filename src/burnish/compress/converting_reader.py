"""A reader whose tensors are made of another reader's: how folders of other programs are shown to the loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorInfo, TensorReader
from burnish.models.shard_cut import Span


class ConvertingReader(TensorReader):
    """A reader whose tensors are made of another reader's."""

    def __init__(self, reader: TensorReader) -> None:
        self.folder: Path = reader.folder
        self._pickled = {}
        self._source = reader
        self.tensors: dict[str, TensorInfo] = {}

    def make(self, name: str) -> Tensor:
        """The tensor to show under this name, in the dtype and shape that `tensors` says."""
        raise NotImplementedError

    def read_into(self, name: str, destination: Tensor) -> None:
        """See `TensorReader.read_into`."""
        if self.tensors[name] == self._source.tensors.get(name):
            self._source.read_into(name, destination)
            return
        made = self.make(name)
        if made.shape != destination.shape:
            raise CheckpointError(
                f"{self.info(name).path}: {name} has the wrong shape",
                got=list(made.shape),
                expected=list(destination.shape),
            )
        destination.copy_(made)

    def read_part(
        self, name: str, *, rows: Sequence[Span], columns: Sequence[Span] | None = None
    ) -> tuple[Tensor, int]:
        """See `TensorReader.read_part`; a tensor that has to be converted is read whole, and a part of it kept."""
        whole = self.read(name)
        part = torch.cat([whole[begin:end] for begin, end in rows])
        if columns is not None:
            part = torch.cat([part[:, begin:end] for begin, end in columns], dim=1)
        return part, whole.nbytes

    def same(self, name: str, other: str) -> bool:
        """See `TensorReader.same`."""
        return torch.equal(self.read(name), self.read(other))

    def _show(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        info = self._source.info(name)
        self.tensors[name] = TensorInfo(name, dtype, shape, info.path, info.start)
