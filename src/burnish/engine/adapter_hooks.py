"""Adapters over the modules of a torch decoder: each packed row gets the low-rank product of its own sequence's.

The decoder's modules stay as they are, whatever they are (dense, quantized, joined); forward hooks add to their
outputs, and only while a step selects adapters.

Shapes: T packed tokens, L rows whose logits are wanted, S sequences, R rank, I in features, O out features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from burnish.engine.step import AdapterMatrices, StepInputs
from burnish.models.decoder import Decoder

_HEAD = "lm_head"
# Linears that `packing` joins into one, in the order of its outputs.
_JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

_Rows = Mapping[int, "Tensor | slice"]


class _Part(NamedTuple):
    """One adapter's product for the outputs begin .. begin + O - 1 of a module."""

    adapter: int
    begin: int
    a_RI: Tensor
    b_OR: Tensor


class AdapterHooks:
    """The hooks of one decoder.

    Args:
        decoder: gets hooks once there are adapters; nothing else of it changes.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._rows: _Rows = {}
        self._head_rows: _Rows = {}

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """See `Backend.set_adapters`. The matrices are copied where device or dtype differ from the decoder's."""
        dtype, device = self._decoder.dtype, self._decoder.device
        parts: dict[str, list[_Part]] = {}
        moved: dict[int, Tensor] = {}

        def here(tensor: Tensor) -> Tensor:
            # Several linears may share one A.
            return moved.setdefault(tensor.data_ptr(), tensor.to(device=device, dtype=dtype))

        for index, matrices in enumerate(adapters):
            for name, (a_RI, b_OR) in (matrices or {}).items():
                module, begin = self._place_of(name)
                parts.setdefault(module, []).append(_Part(index, begin, here(a_RI), here(b_OR)))
        self.close()
        for name, of_module in parts.items():
            module = self._decoder.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(of_module, head=name == _HEAD)))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def selected(self, step: StepInputs) -> Iterator[None]:
        """While this lasts, the decoder computes the rows of this step, each with its sequence's adapter."""
        if (step.adapters_S < 0).all():
            yield
            return
        adapters_T = np.repeat(step.adapters_S, np.diff(step.row_starts))
        self._rows = self._grouped(adapters_T)
        self._head_rows = self._grouped(adapters_T[step.logit_rows_L])
        try:
            yield
        finally:
            self._rows = self._head_rows = {}

    def _grouped(self, adapters_T: np.ndarray) -> _Rows:
        rows: dict[int, Tensor | slice] = {}
        for index in np.unique(adapters_T[adapters_T >= 0]).tolist():
            places = np.flatnonzero(adapters_T == index)
            first, last = int(places[0]), int(places[-1])
            together = last - first + 1 == len(places)
            rows[index] = slice(first, last + 1) if together else torch.from_numpy(places).to(self._decoder.device)
        return rows

    def __del__(self) -> None:
        self.close()

    def _hook(self, parts: Sequence[_Part], *, head: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # The decoder may outlive whoever serves adapters on it.
        hooks = weakref.ref(self)

        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            here = hooks()
            rows = None if here is None else here._head_rows if head else here._rows
            if not rows:
                return
            x_TI, out_TO = args[0].flatten(0, -2), out.view(-1, out.shape[-1])
            for adapter, begin, a_RI, b_OR in parts:
                chosen = rows.get(adapter)
                if chosen is not None:
                    low = x_TI[chosen].to(a_RI.dtype) @ a_RI.T @ b_OR.T
                    out_TO[chosen, begin : begin + b_OR.shape[0]] += low.to(out_TO.dtype)

        return add

    def _place_of(self, name: str) -> tuple[str, int]:
        """The module that computes this linear, and which of its outputs is the linear's first."""
        parent, _, role = name.rpartition(".")
        for joined, roles in _JOINED.items():
            if role in roles and hasattr(self._decoder.get_submodule(parent), joined):
                shapes = self._decoder.config.linear_shapes()
                before = roles[: roles.index(role)]
                return f"{parent}.{joined}", sum(shapes[f"{parent}.{one}"][0] for one in before)
        return name, 0
