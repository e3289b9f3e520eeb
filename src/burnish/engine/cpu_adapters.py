"""Adapters as the compiled kernels want them: one struct for each place of each layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from burnish.engine.step import AdapterMatrices
from burnish.errors import ConfigError
from burnish.kernels.cpu.structs import ADAPTER_PLACES, Adapter


def adapter_structs(adapters: Sequence[AdapterMatrices | None], *, num_layers: int) -> ctypes.Array[Adapter]:
    """[adapter][layer][place], in that order; the structs point into the matrices, which the caller has to keep.

    Raises:
        ConfigError: an adapter changes a linear that the kernels cannot adapt.
    """
    structs = (Adapter * (len(adapters) * num_layers * len(ADAPTER_PLACES)))()
    for index, matrices in enumerate(adapters):
        for name, (a_RI, b_OR) in (matrices or {}).items():
            # model.layers.3.self_attn.q_proj
            role, layer = name.rpartition(".")[2], name.split(".")[2:3]
            if role not in ADAPTER_PLACES:
                raise ConfigError(
                    f"the compiled kernels cannot run an adapter of {name}", remedy="Choose backend torch."
                )
            place = (index * num_layers + int(layer[0])) * len(ADAPTER_PLACES) + ADAPTER_PLACES.index(role)
            structs[place] = Adapter(
                rank=a_RI.shape[0],
                inputs=a_RI.shape[1],
                outputs=b_OR.shape[0],
                a=a_RI.data_ptr(),
                b=b_OR.data_ptr(),
            )
    return structs
