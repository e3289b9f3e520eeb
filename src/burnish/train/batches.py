"""Rows as the trainer takes them, and padded micro-batches. Which rows make a step is in `row_order.py`.

Rows of a step are chosen before the step is cut into micro-batches, so that the micro-batch size never changes what is
learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from burnish.train.losses import IGNORED_LABEL

# B rows, T tokens

WIDTH_STEP = 16


class TrainingExample(Protocol):
    """A row as token ids and labels of the same length; the label of a token to be learned is that token, else -100."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, right-padded.

    Attributes:
        tokens_BT: int64 input ids. The last token of a row predicts nothing and is left out.
        labels_BT: int64, the token after each position, -100 where it is not learned.
        num_tokens: real tokens of the rows, without padding.
        num_labels: positions that are learned.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    num_tokens: int
    num_labels: int

    @property
    def num_slots(self) -> int:
        """Positions that are computed."""
        return self.tokens_BT.numel()

    @property
    def num_positions(self) -> int:
        """Positions that hold a token."""
        return self.num_tokens - len(self.tokens_BT)


def count_labels(example: TrainingExample) -> int:
    """Tokens of the row that are learned; the first token has no predecessor and never counts."""
    return sum(label != IGNORED_LABEL for label in example.labels[1:])


def collate(examples: Sequence[TrainingExample], *, device: torch.device | str, max_width: int | None = None) -> Batch:
    """Pad rows on the right, where causal attention never looks; padding's labels are masked, its ids are 0.

    The width is a multiple of `WIDTH_STEP`: oneDNN builds and keeps a kernel for every new shape, which costs more time
    and memory than the padding.

    Args:
        max_width: what the model can take; the width stays within it.
    """
    longest = max(len(example.tokens) for example in examples) - 1
    width = max(longest, min(-(-longest // WIDTH_STEP) * WIDTH_STEP, max_width or longest))
    tokens, labels = [], []
    for example in examples:
        pad = width - len(example.tokens) + 1
        tokens.append([*example.tokens[:-1], *[0] * pad])
        labels.append([*example.labels[1:], *[IGNORED_LABEL] * pad])
    return Batch(
        tokens_BT=torch.tensor(tokens, dtype=torch.int64, device=device),
        labels_BT=torch.tensor(labels, dtype=torch.int64, device=device),
        num_tokens=sum(len(example.tokens) for example in examples),
        num_labels=sum(count_labels(example) for example in examples),
    )
