"""Decoding steps replayed as CUDA graphs: the whole step is one launch, whatever the number of its kernels.

A graph has fixed shapes and addresses, so there is one per *bucket*, a number of sequences, with its own input tensors;
a step runs in the smallest bucket that holds it. Rows that pad it up have no places in the cache and an empty context:
they write nothing and read nothing. Graphs are captured when first needed, and share one pool of memory.

Shapes: B rows of a bucket, S sequences of the step, N blocks of a table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from burnish.engine.gpu_step import DeviceStep, Tiles, places_of, upload
from burnish.engine.step import StepInputs
from burnish.kernels.gpu.attention import PagedRows

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)

Outputs = tuple[Tensor, Tensor]
"""(B,) int64 arg-max ids, and (B, V) logits."""


class Graph(Protocol):
    """A captured computation."""

    def replay(self) -> Outputs: ...


MakeGraph = Callable[[Callable[[], Outputs]], Graph]
TilesOf = Callable[[Tensor, Tensor], tuple[Tiles, ...]]


class CudaGraph:
    """A computation captured on the card.

    Args:
        compute: runs a few times first, so that kernels are compiled and libraries have set themselves up.
        pool: shared with other graphs that never run at the same time.
    """

    def __init__(self, compute: Callable[[], Outputs], *, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = compute()

    def replay(self) -> Outputs:
        self._graph.replay()
        return self._outputs


@dataclass(kw_only=True)
class _Bucket:
    """A graph and what it reads: `inputs_4B` holds tokens, positions, places and context lengths."""

    inputs_4B: Tensor
    tables_BN: Tensor
    graph: Graph


class DecodeGraphs:
    """The graphs of one backend.

    Args:
        compute: a step's ids and logits, from tensors that stay where they are.
        tiles_of: the attention's tiles from the sequences' indices and first tokens, both 0 .. B - 1.
        make_graph: `CudaGraph` with its pool, or what stands in for it.
        table_width: blocks of the longest sequence.
    """

    def __init__(
        self,
        compute: Callable[[DeviceStep], Outputs],
        *,
        tiles_of: TilesOf,
        make_graph: MakeGraph,
        table_width: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._compute, self._tiles_of, self._make_graph = compute, tiles_of, make_graph
        self._table_width, self._block_size, self._device = table_width, block_size, device
        self._buckets: dict[int, _Bucket] = {}

    @property
    def captured(self) -> list[int]:
        """Buckets that have their graph."""
        return sorted(self._buckets)

    def takes(self, step: StepInputs) -> bool:
        """Whether this step is one that graphs compute: one token of each sequence, all of whose logits are wanted."""
        num_rows = len(step.context_lens_S)
        return (
            len(step.tokens_T) == len(step.logit_rows_L) == num_rows
            and 0 < num_rows <= BUCKETS[-1]
            and step.block_tables_SN.shape[1] <= self._table_width
            and bool((step.adapters_S < 0).all())
        )

    def run(self, step: StepInputs) -> Outputs:
        """Compute a step that `takes` accepts; what is returned holds until the next one."""
        num_rows, width = step.block_tables_SN.shape
        size = next(bucket for bucket in BUCKETS if bucket >= num_rows)
        bucket = self.bucket(size)
        inputs_4B = np.zeros((4, size), dtype=np.int32)
        inputs_4B[2] = -1
        arrays = (step.tokens_T, step.positions_T, places_of(step, block_size=self._block_size), step.context_lens_S)
        inputs_4B[:, :num_rows] = np.stack(arrays)
        inputs, tables_SN = upload([inputs_4B, step.block_tables_SN], self._device)
        bucket.inputs_4B.copy_(inputs)
        bucket.tables_BN[:num_rows, :width] = tables_SN
        ids_B, logits_BV = bucket.graph.replay()
        return ids_B[:num_rows], logits_BV[:num_rows]

    def capture_up_to(self, num_rows: int) -> None:
        """Capture the buckets that steps of up to so many sequences need, the largest first: it sizes the pool."""
        needed = [size for index, size in enumerate(BUCKETS) if index == 0 or BUCKETS[index - 1] < num_rows]
        for size in reversed(needed):
            self.bucket(size)

    def bucket(self, size: int) -> _Bucket:
        """The bucket of this size, captured now if it was not."""
        if size in self._buckets:
            return self._buckets[size]
        inputs_4B = torch.zeros((4, size), dtype=torch.int32, device=self._device)
        # Capturing computes with padding only, which touches no sequence's cache.
        inputs_4B[2] = -1
        tables_BN = torch.full((size, self._table_width), -1, dtype=torch.int32, device=self._device)
        row_starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        tokens_B, positions_B, places_B, context_lens_B = inputs_4B.unbind()
        step = DeviceStep(
            tokens_T=tokens_B,
            positions_T=positions_B,
            places_T=places_B,
            lengths_T=None,
            rows=PagedRows(row_starts=row_starts, context_lens_S=context_lens_B, tables_SN=tables_BN),
            tiles=self._tiles_of(row_starts[:size], row_starts[:size]),
            logit_rows_L=None,
        )
        graph = self._make_graph(lambda: self._compute(step))
        self._buckets[size] = made = _Bucket(inputs_4B=inputs_4B, tables_BN=tables_BN, graph=graph)
        return made
