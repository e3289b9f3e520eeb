"""The seam between the runner and whatever computes a step: one batch's packed rows in, arg-max ids or logits out.

Rows of several sequences lie one after another without padding; every array lives on the CPU.

Shapes: T tokens, S sequences, L positions whose logits are wanted, N blocks of the longest table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

AdapterMatrices: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""A (rank, in) and B (out, rank) of a low-rank adapter by the linears' canonical names: y += (x A') B'.

Both are float32, contiguous and on the CPU; the scaling is multiplied into B.
"""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step's packed rows.

    The token at position p of sequence s lives in block `block_tables_SN[s, p // block_size]`, place `p % block_size`.
    A sequence appears once, its new tokens are consecutive, and every place it attends to is in the cache or in this
    step.

    Attributes:
        tokens_T: int32 token ids.
        positions_T: int32 position of each token in its sequence.
        row_starts: int32 (S + 1,): tokens of sequence s are row_starts[s] .. row_starts[s + 1] - 1.
        context_lens_S: int32 tokens of each sequence in the cache after this step, its last position + 1.
        block_tables_SN: int32, padded with -1; blocks freed because no window reaches them are -1 too.
        logit_rows_L: int32 indices into T, rising.
        adapters_S: int32 index of each sequence's LoRA adapter, -1 for none.
        rope_lens_S: int32; a token at position p is rotated as in a sequence of max(rope_lens_S, p + 1) tokens. Only
            the rope rules that look at the length ("dynamic", "longrope") need it.
    """

    tokens_T: np.ndarray
    positions_T: np.ndarray
    row_starts: np.ndarray
    context_lens_S: np.ndarray
    block_tables_SN: np.ndarray
    logit_rows_L: np.ndarray
    adapters_S: np.ndarray
    rope_lens_S: np.ndarray


class Backend(Protocol):
    """Computes steps, and owns the KV cache's memory.

    Attributes:
        name: "torch", "cpu" or "gpu".
        num_blocks, block_size: the cache's; block ids are 0 .. num_blocks - 1.
        kv_bytes: bytes of the cache as allocated.
        weights_bytes: bytes of the tensors it computes with, each storage once.
    """

    name: str
    device: torch.device
    num_blocks: int
    block_size: int

    @property
    def kv_bytes(self) -> int: ...

    @property
    def weights_bytes(self) -> int: ...

    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """Compute one step and keep its keys and values.

        Returns:
            greedy: (L,) int64 arg-max ids, the lowest id among equals, -1 where the logits are NaN.
            Otherwise (L, V) float32 logits, which the caller may change in place until the next call.
        """
        ...

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """Serve these adapters from now on, by their index in `StepInputs.adapters_S`; None is a place not used.

        Called between steps. The matrices are not changed by anybody afterwards.

        Raises:
            ConfigError: this backend cannot compute one of them; those from before are still served.
        """
        ...

    def reset(self) -> None:
        """Forget all keys and values after a failed step: nothing left there may reach later results, NaN included."""
        ...
