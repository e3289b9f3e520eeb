"""Noise on the embeddings while training.

Jain et al., 2023, arXiv:2310.05914 (NEFTune): uniform in plus and minus alpha / sqrt(L D), L tokens of the row, D
the hidden size; the paper's alpha is 5 to 15.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# B rows, T tokens, D hidden


class EmbeddingNoise:
    """Adds noise to what an embedding gives while it is in training mode and gradients are recorded.

    The noise is drawn from torch's own generator of the device, so a seed repeats it.

    Attributes:
        alpha: the scale.
        lengths_BT: length of the row that each position belongs to, for micro-batches that hold several rows end to
            end, or (B, 1) for padded ones; the width T of the batch where None.
    """

    def __init__(self, embedding: nn.Embedding, alpha: float) -> None:
        self.alpha = alpha
        self.lengths_BT: Tensor | None = None
        self._handle = embedding.register_forward_hook(self._add)

    def remove(self) -> None:
        """Take the noise off the embedding."""
        self._handle.remove()

    def _add(self, module: nn.Module, _inputs: Any, out_BTD: Tensor) -> Tensor | None:
        if not (module.training and torch.is_grad_enabled() and self.alpha):
            return None
        width, hidden = out_BTD.shape[-2:]
        noise_BTD = torch.empty_like(out_BTD, requires_grad=False).uniform_(-1.0, 1.0)
        if self.lengths_BT is None:
            noise_BTD *= self.alpha / math.sqrt(width * hidden)
        else:
            spread_BT = self.alpha * (self.lengths_BT.clamp(min=1) * float(hidden)).rsqrt()
            noise_BTD *= spread_BT.unsqueeze(-1).to(out_BTD.dtype)
        return out_BTD + noise_BTD


@contextlib.contextmanager
def embedding_noise(embedding: nn.Embedding, alpha: float) -> Iterator[EmbeddingNoise]:
    """`EmbeddingNoise` inside the block; with alpha 0 nothing is added."""
    noise = EmbeddingNoise(embedding, alpha)
    try:
        yield noise
    finally:
        noise.remove()
