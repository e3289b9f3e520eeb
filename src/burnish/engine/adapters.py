"""The adapters that one engine serves beside its base: their names, their places, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from burnish.engine.sequence import Sequence
from burnish.engine.step import AdapterMatrices
from burnish.errors import ConfigError, RequestError
from burnish.models.adapter_files import LoraWeights, fingerprint, read_adapter
from burnish.models.decoder import Decoder

if TYPE_CHECKING:
    from burnish.engine.step import Backend


class AdapterSet:
    """Named low-rank adapters of one base.

    An adapter has a place, the index by which backends know it; places are used again. It also has a number that no
    other ever has: what one adapter computed is never found in the cache by another.

    Args:
        decoder: the base, before its weights are laid out anew; only read, and not kept.
        folders: adapters to begin with, by name.

    Raises:
        ConfigError, CheckpointError: as `add`.
    """

    def __init__(self, decoder: Decoder, folders: Mapping[str, str | Path] | None = None) -> None:
        self._config = decoder.config
        self._fingerprint = fingerprint(decoder)
        self._places: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._matrices: list[AdapterMatrices | None] = []
        self._backend: Backend | None = None
        self._last_number = 0
        for name, folder in (folders or {}).items():
            self.add(name, folder)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @property
    def num_bytes(self) -> int:
        """Bytes of all matrices, shared ones once."""
        tensors = (tensor for each in self._matrices for pair in (each or {}).values() for tensor in pair)
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    @property
    def reaches_output_layer(self) -> bool:
        return any("lm_head" in each for each in self._matrices if each)

    def attach(self, backend: Backend) -> None:
        """Hand the adapters to what computes with them, now and whenever they change."""
        self._backend = backend
        if self._matrices:
            backend.set_adapters(self._matrices)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter folder in PEFT's format.

        Raises:
            ConfigError: the name is taken or empty, the adapter was made for another base or is no plain LoRA, or the
                backend cannot compute it; nothing is changed then.
            CheckpointError: a file is missing or corrupt.
        """
        if not name or not isinstance(name, str):
            raise ConfigError("an adapter needs a name", got=repr(name))
        if name in self._places:
            raise ConfigError(f"there is an adapter {name} already", remedy="Remove it first, or choose another name.")
        matrices = scaled(read_adapter(folder, self._config, base_fingerprint=self._fingerprint))
        place = next((place for place, each in enumerate(self._matrices) if each is None), len(self._matrices))
        changed = [*self._matrices]
        changed[place : place + 1] = [matrices]
        if self._backend is not None:
            self._backend.set_adapters(changed)
        self._matrices = changed
        self._places[name] = place
        self._last_number += 1
        self._numbers[name] = self._last_number

    def remove(self, name: str, *, sequences: Iterable[Sequence]) -> None:
        """Forget an adapter.

        Args:
            sequences: all that are not finished.

        Raises:
            ConfigError: there is none of this name, or one of the sequences uses it.
        """
        if name not in self._places:
            raise ConfigError(f"there is no adapter {name}", expected=self._known())
        if any(sequence.adapter_name == name for sequence in sequences):
            raise ConfigError(f"the adapter {name} is in use", remedy="Wait for its requests, or abort them.")
        changed = [*self._matrices]
        changed[self._places[name]] = None
        while changed and changed[-1] is None:
            changed.pop()
        if self._backend is not None:
            self._backend.set_adapters(changed)
        self._matrices = changed
        del self._places[name], self._numbers[name]

    def check(self, name: str | None) -> None:
        """Make sure that there is an adapter of this name; None is the base alone.

        Raises:
            RequestError: there is none.
        """
        if name is not None and name not in self._places:
            raise RequestError(f"there is no adapter {name!r}", expected=self._known())

    def assign(self, sequence: Sequence) -> None:
        """Set the sequence's `adapter` and `adapter_number` from its `adapter_name`; raises as `check`."""
        self.check(sequence.adapter_name)
        if sequence.adapter_name is not None:
            sequence.adapter = self._places[sequence.adapter_name]
            sequence.adapter_number = self._numbers[sequence.adapter_name]

    def _known(self) -> str:
        return f"one of {', '.join(self._places)}" if self._places else "none, as the engine has no adapters"


def adapter_of_each(adapter: str | SequenceOf[str | None] | None, count: int) -> list[str | None]:
    """The adapter's name of each of so many prompts, from one for all or one for each.

    Raises:
        RequestError: the numbers differ.
    """
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if len(adapter) != count:
        raise RequestError("prompts and adapters differ in number", got=f"{count} prompts, {len(adapter)} adapters")
    return list(adapter)


def scaled(weights: LoraWeights) -> AdapterMatrices:
    """A and B of each linear, float32 and contiguous, the scaling multiplied into B.

    Raises:
        ConfigError: a DoRA adapter, which is more than a product to add.
    """
    if weights.magnitudes:
        raise ConfigError(
            f"{weights.folder} is a DoRA adapter, which cannot be served beside its base",
            remedy="Run it alone with --adapter, or merge it: burnish merge ADAPTER --out DIR",
        )
    return {
        name: (a_RI.contiguous(), torch.mul(b_OR, weights.scale).contiguous())
        for name, (a_RI, b_OR) in weights.pairs.items()
    }
