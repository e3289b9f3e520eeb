"""The finished blocks of a quantization that is under way, on disk, so that a killed run can go on.

    <folder>/state.json                      what is made of what, and the finished blocks with their checksums
    <folder>/block-00007/model.safetensors   a block's tensors by their names inside it, linears packed

A block's file is written whole before the state names it. Hidden states are not kept: going on runs the calibration
tokens through the finished blocks again, which costs a forward each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from burnish.compress.calibration import block_linears
from burnish.compress.config import QuantizeConfig
from burnish.compress.group_linear import PACKED, GroupQuantizedLinear
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.errors import CheckpointError
from burnish.models.atomic_files import write_text, writing_to
from burnish.models.checkpoint import TensorReader, read_json_object
from burnish.models.checkpoint_writing import pending, write_safetensors

FORMAT = 1
STATE = "state.json"
CHUNK_BYTES = 1 << 22


class PartialFolder:
    """Finished blocks of one quantization; nothing is written before the first is done.

    Args:
        folder: where they are or will be.
        identity: everything that decides the result, as plain JSON; saved, and compared by the caller.
        environment: what may change its last bits, as plain JSON.
    """

    def __init__(
        self, folder: Path, *, identity: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self._state: dict[str, Any] = {
            "format": FORMAT,
            "identity": dict(identity or {}),
            "environment": dict(environment or {}),
            "widths": None,
            "blocks": [],
        }

    def saved(self) -> dict[str, Any] | None:
        """The state that is on disk; None when there is none that can be read."""
        try:
            state = read_json_object(self.folder / STATE)
        except CheckpointError:
            return None
        blocks = state.get("blocks")
        whole = isinstance(blocks, list) and all(isinstance(block, dict) and "linears" in block for block in blocks)
        return state if whole and state.get("format") == FORMAT else None

    def go_on(self) -> int:
        """Take over what is on disk, up to the first block that is not as it was written; returns the blocks taken."""
        state = self.saved()
        if state is None:
            return 0
        whole = 0
        for layer, block in enumerate(state["blocks"]):
            if _digest(self._path(layer)) != block.get("sha256"):
                break
            whole += 1
        self._state |= {"widths": state.get("widths"), "blocks": state["blocks"][:whole]}
        return whole

    def clear(self) -> None:
        """Remove everything that is on disk."""
        if self.folder.exists():
            with writing_to(self.folder):
                shutil.rmtree(self.folder)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return self._state["identity"]

    @property
    def environment(self) -> dict[str, Any]:
        """What may change its last bits."""
        return self._state["environment"]

    @property
    def widths(self) -> dict[str, int] | None:
        """Bits of every linear by canonical name, where they were chosen one by one before."""
        return self._state["widths"]

    def keep_widths(self, widths: Mapping[str, int]) -> None:
        """Remember the bits that were chosen."""
        self._state["widths"] = dict(widths)
        self._write_state()

    @property
    def finished(self) -> int:
        """Blocks that are there."""
        return len(self._state["blocks"])

    def records(self, layer: int) -> list[dict[str, Any]]:
        """What was recorded of a finished block's linears."""
        return self._state["blocks"][layer]["linears"]

    def restore(
        self, layer: int, block: nn.Module, config: QuantizeConfig, widths: Mapping[str, int]
    ) -> dict[str, QuantizedWeight]:
        """Fill a dense block with what was made of it; its linears get the weights that the integers stand for.

        Args:
            config: that the block was quantized with.
            widths: bits of linears, by their name in the block, that are not the config's.

        Raises:
            CheckpointError: the file does not fit the block.
        """
        linears = block_linears(block)
        reader = TensorReader(self._path(layer).parent)
        done: dict[str, QuantizedWeight] = {}
        for name, linear in linears.items():
            packed = GroupQuantizedLinear(
                linear.in_features,
                linear.out_features,
                bits=widths.get(name, config.bits),
                group_size=config.group_size,
                device=linear.weight.device,
            )
            for suffix in PACKED:
                reader.read_into(f"{name}.{suffix}", getattr(packed, suffix))
            done[name] = packed.quantized()
            linear.weight.copy_(done[name].dequantize(dtype=linear.weight.dtype))
        for name, parameter in block.named_parameters():
            if name.removesuffix(".weight") not in linears:
                reader.read_into(name, parameter.data)
        return done

    def add(self, block: nn.Module, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the next block, its linears quantized, and then name it in the state.

        Raises:
            CapacityError, CheckpointError: it cannot be written.
        """
        path = self._path(self.finished)
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {name: pending(tensor) for name, tensor in block.state_dict().items()})
        self._state["blocks"].append({"sha256": _digest(path), "linears": [dict(record) for record in records]})
        self._write_state()

    def _write_state(self) -> None:
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / STATE, json.dumps(self._state, indent=1) + "\n")

    def _path(self, layer: int) -> Path:
        return self.folder / f"block-{layer:05d}" / "model.safetensors"


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; None when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()
