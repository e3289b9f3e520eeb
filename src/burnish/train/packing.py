"""Rows of a micro-batch laid end to end: nothing is padded to the longest row, and no row sees another.

Positions restart with every row, attention stays within it (`packed_attention.py`), and so the loss is that of the rows
one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.plan.training import filled
from burnish.train.batches import TrainingExample, count_labels
from burnish.train.losses import IGNORED_LABEL
from burnish.train.packing_plan import cut_step

# N positions, R rows

# How positions are filled up, and how many there are at once by default: `plan/training.py`, which predicts with it.


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch.

    Attributes:
        tokens_N: int64 input ids, row after row. The last token of a row predicts nothing and is left out. What fills
            the batch up is a last row of its own.
        labels_N: int64, the token after each position, -100 where it is not learned.
        positions_N: int64, position in the row; 0 in the filling.
        starts: R + 1 numbers: row r is starts[r] .. starts[r + 1] - 1; the filling counts as a row.
        num_tokens: real tokens of the rows.
        num_labels: positions that are learned.
        num_positions: positions that hold a token.
    """

    tokens_N: Tensor
    labels_N: Tensor
    positions_N: Tensor
    starts: tuple[int, ...]
    num_tokens: int
    num_labels: int
    num_positions: int

    @property
    def num_slots(self) -> int:
        """Positions that are computed."""
        return len(self.tokens_N)

    @property
    def lengths_N(self) -> Tensor:
        """int64, the length of the row that each position belongs to."""
        bounds = torch.tensor(self.starts, device=self.tokens_N.device)
        lengths_R = bounds.diff()
        return lengths_R.repeat_interleave(lengths_R)


def pack(rows: Sequence[TrainingExample], *, device: torch.device | str) -> PackedBatch:
    """Lay `rows` end to end and fill up to a width that comes often."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    starts = [0]
    for row in rows:
        tokens.extend(row.tokens[:-1])
        labels.extend(row.labels[1:])
        positions.extend(range(len(row.tokens) - 1))
        if len(tokens) > starts[-1]:
            starts.append(len(tokens))
    num_positions = len(tokens)
    missing = filled(num_positions) - num_positions
    if missing:
        tokens.extend([0] * missing)
        labels.extend([IGNORED_LABEL] * missing)
        positions.extend([0] * missing)
        starts.append(len(tokens))
    return PackedBatch(
        tokens_N=torch.tensor(tokens, dtype=torch.int64, device=device),
        labels_N=torch.tensor(labels, dtype=torch.int64, device=device),
        positions_N=torch.tensor(positions, dtype=torch.int64, device=device),
        starts=tuple(starts),
        num_tokens=sum(len(row.tokens) for row in rows),
        num_labels=sum(count_labels(row) for row in rows),
        num_positions=num_positions,
    )


def split_step(rows: Sequence[TrainingExample], *, max_rows: int, max_tokens: int) -> list[list[TrainingExample]]:
    """Divide a step's rows into micro-batches of at most `max_rows` rows and `max_tokens` positions, filled well.

    Which rows stand together changes nothing but the order in which gradients are summed. A row longer than
    `max_tokens` is a micro-batch of its own.
    """
    parts = cut_step([len(row.tokens) - 1 for row in rows], max_rows, max_tokens)
    return [[rows[number] for number in part] for part in parts]
