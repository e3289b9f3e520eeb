"""Perplexity of a model over token sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from burnish.measure.scoring import (
    LabelledTokens,
    LanguageModel,
    batch_spans,
    chosen_hidden,
    chunks,
    default_window,
    device_of,
    evaluation_mode,
    make_spans,
)

# N predicted tokens of a batch, D hidden, C tokens of one chunk, V vocabulary


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log likelihood (nats per token)."""

    perplexity: float
    nll_mean: float
    num_tokens: int
    num_sequences: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: LanguageModel,
    sequences: Sequence[Sequence[int] | LabelledTokens],
    *,
    positions: str = "all",
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 2048,
    chunk_tokens: int = 256,
) -> Perplexity:
    """Score every token of the sequences once, long ones through overlapping windows.

    The first token of a sequence has nothing before it and is not scored.

    Args:
        model: a decoder with `hidden` and `logits`.
        sequences: token ids, or examples with labels.
        positions: `all`, or `labels` (only the tokens that an example learns).
        window: longest stretch seen at once; the model's context, at most 2048, when None.
        stride: tokens between the starts of two windows; half a window when None.
        batch_tokens: padded tokens per forward.
        chunk_tokens: positions whose logits exist at the same time.

    Raises:
        DataError: there is nothing to score.
    """
    window = window or default_window(model)
    spans = make_spans(sequences, window=window, stride=stride or max(1, window // 2), positions=positions)
    total = 0.0
    count = 0
    with torch.inference_mode(), evaluation_mode(model):
        for batch in batch_spans(spans, batch_tokens=batch_tokens, device=device_of(model)):
            hidden_ND = chosen_hidden(model, batch)
            for part in chunks(len(hidden_ND), chunk_tokens):
                logits_CV = model.logits(hidden_ND[part]).float()
                losses_C = F.cross_entropy(logits_CV, batch.targets_N[part], reduction="none")
                total += losses_C.double().sum().item()
            count += len(hidden_ND)
    mean = total / count
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll_mean=mean,
        num_tokens=count,
        num_sequences=len({span.sequence for span in spans}),
    )
