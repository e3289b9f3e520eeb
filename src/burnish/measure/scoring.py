"""Next-token logits at chosen positions of token sequences, a few rows at a time; perplexity and KL are built on it.

A (positions, vocabulary) float32 array never holds more than one chunk, so that a 128k vocabulary costs little.
"""

# B sequences, T tokens (padded on the right), D hidden, N chosen positions, C positions of one chunk, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.errors import DataError

IGNORED = -100
"""The label of a token that is not learned and not scored."""

WIDTH_STEP = 32
"""Batches are filled up to a multiple of so many positions: matrix libraries keep compiled code for every width."""


class LanguageModel(Protocol):
    """The part of `models.decoder.Decoder` that scoring needs."""

    def hidden(self, tokens_BT: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class LabelledTokens(Protocol):
    """A rendered example: labels are aligned with the tokens (not shifted), `IGNORED` where nothing is scored."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of one sequence that goes through the model at once."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    """Positions (>= 1) in `tokens` whose token is predicted from those before it."""
    sequence: int


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """Right-padded tokens of some spans and the flat list of what is predicted in them."""

    tokens_BT: Tensor
    rows_N: Tensor
    before_N: Tensor
    """Position whose hidden state predicts the target, which stands one later."""
    targets_N: Tensor

    def to(self, device: torch.device) -> TargetBatch:
        """The same batch on another device."""
        return TargetBatch(
            tokens_BT=self.tokens_BT.to(device),
            rows_N=self.rows_N.to(device),
            before_N=self.before_N.to(device),
            targets_N=self.targets_N.to(device),
        )


def make_spans(
    sequences: Sequence[Sequence[int] | LabelledTokens],
    *,
    window: int,
    stride: int,
    positions: str = "all",
) -> list[Span]:
    """Cut sequences into windows so that every target is scored exactly once, with as much context as fits.

    Args:
        sequences: token ids, or examples with labels.
        window: longest stretch the model sees, in tokens.
        stride: tokens from one window's start to the next, less than `window`; a smaller one gives more context.
        positions: `all`, or `labels` (only tokens with a label; plain token lists have all).

    Raises:
        DataError: nothing is left to score, or `window` and `stride` do not fit together.
    """
    if positions not in ("all", "labels"):
        raise DataError("unknown positions to score", got=repr(positions), expected="'all' or 'labels'")
    if not 1 <= stride < window:  # windows must overlap, or the first token of each would go unscored
        raise DataError(
            "the scoring window does not work",
            got=f"window {window}, stride {stride}",
            expected="1 <= stride < window",
        )
    spans: list[Span] = []
    for number, sequence in enumerate(sequences):
        tokens, wanted = _targets(sequence, positions)
        scored_to = 0
        begin = 0
        while scored_to < len(tokens):
            end = min(begin + window, len(tokens))
            targets = tuple(p - begin for p in range(max(scored_to, begin + 1), end) if wanted[p])
            if targets:
                spans.append(Span(tokens=tuple(tokens[begin:end]), targets=targets, sequence=number))
            scored_to = end
            begin += stride
    if not spans:
        raise DataError(
            "there is nothing to score",
            got=f"{len(sequences)} sequences without a token to predict",
            expected="sequences of two or more tokens with at least one label",
        )
    return spans


def _targets(sequence: Sequence[int] | LabelledTokens, positions: str) -> tuple[list[int], list[bool]]:
    labels: Any = getattr(sequence, "labels", None)
    tokens: list[int] = list(getattr(sequence, "tokens", sequence))  # type: ignore[arg-type]
    if positions == "all" or labels is None:
        labels = tokens
    wanted = [label != IGNORED for label in labels]
    if wanted:
        wanted[0] = False  # nothing stands before the first token
    return tokens, wanted


def batch_spans(spans: Sequence[Span], *, batch_tokens: int, device: torch.device) -> Iterator[TargetBatch]:
    """Group spans of similar length, at most `batch_tokens` padded tokens at a time (one span at least)."""
    longest = max((len(span.tokens) for span in spans), default=0)
    group: list[Span] = []
    width = 0
    for span in sorted(spans, key=lambda span: len(span.tokens)):
        wider = min(longest, -(-len(span.tokens) // WIDTH_STEP) * WIDTH_STEP)  # no further than the context reaches
        if group and wider * (len(group) + 1) > batch_tokens:
            yield _pad(group, width, device)
            group = []
        group.append(span)
        width = wider
    if group:
        yield _pad(group, width, device)


def _pad(group: Sequence[Span], width: int, device: torch.device) -> TargetBatch:
    tokens_BT = torch.zeros(len(group), width, dtype=torch.long)  # causal: what stands on the right is never seen
    for row, span in enumerate(group):
        tokens_BT[row, : len(span.tokens)] = torch.tensor(span.tokens)
    rows = [row for row, span in enumerate(group) for _ in span.targets]
    before = [target - 1 for span in group for target in span.targets]
    targets = [span.tokens[target] for span in group for target in span.targets]
    return TargetBatch(
        tokens_BT=tokens_BT.to(device),
        rows_N=torch.tensor(rows, device=device),
        before_N=torch.tensor(before, device=device),
        targets_N=torch.tensor(targets, device=device),
    )


def chosen_hidden(model: LanguageModel, batch: TargetBatch) -> Tensor:
    """Hidden states that predict the batch's targets: (N, D)."""
    return model.hidden(batch.tokens_BT)[batch.rows_N, batch.before_N]


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def device_of(model: Any) -> torch.device:
    """The device of a module's first parameter or buffer."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def default_window(model: Any, *, longest: int = 2048) -> int:
    """The model's context length, at most `longest`."""
    config = getattr(model, "config", None)
    return min(getattr(config, "max_position_embeddings", None) or longest, longest)


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Switch dropout off for a block and put every model back as it was."""
    modules = [(model, model.training) for model in models if isinstance(model, nn.Module)]
    try:
        for module, _ in modules:
            module.eval()
        yield
    finally:
        for module, training in modules:
            module.train(training)
