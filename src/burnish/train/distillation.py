"""Learning from a parent's distributions instead of labels: the KL divergence from them, where a label asks for one.

Liu et al., 2023, arXiv:2305.17888, train quantized models so. Parent and child share their output layer, so what is
kept of the parent are its final hidden states; logits of both exist for one chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.train.losses import CHUNK_BYTES, IGNORED_LABEL, MIN_CHUNK, ROW_STEP, select_labelled

# N labelled positions, C positions of one chunk, D hidden, V vocabulary


def distillation_loss(
    hidden_BTD: Tensor,
    parent_BTD: Tensor,
    labels_BT: Tensor,
    *,
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    chunk_positions: int | None = None,
) -> Tensor:
    """Sum of KL(parent || child) over labelled positions, in nats, as a float32 scalar; gradients reach `hidden_BTD`.

    Args:
        hidden_BTD: the child's final hidden states, any float dtype.
        parent_BTD: the parent's, without gradient.
        labels_BT: `IGNORED_LABEL` where nothing is asked; what the label is does not matter.
        logits: maps (C, D) hidden states of either to (C, V) logits.
        vocab_size: V, to size the chunks.
        chunk_positions: positions per chunk; by default as many as half of `CHUNK_BYTES` allows.
    """
    hidden_ND, labels_N = select_labelled(hidden_BTD, labels_BT)
    parent_ND, _ = select_labelled(parent_BTD, labels_BT)
    chunk = chunk_positions or max(MIN_CHUNK, CHUNK_BYTES // (8 * vocab_size))
    missing = -len(labels_N) % min(ROW_STEP, chunk)
    hidden_ND, parent_ND = (F.pad(each_ND, (0, 0, 0, missing)) for each_ND in (hidden_ND, parent_ND))
    labels_N = F.pad(labels_N, (0, missing), value=IGNORED_LABEL)
    return _ChunkedDivergence.apply(hidden_ND, parent_ND, labels_N, logits, chunk)  # type: ignore[return-value]


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        parent_ND: Tensor,
        labels_N: Tensor,
        logits: Callable[[Tensor], Tensor],
        chunk: int,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_grad else None
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            counts_C1 = (labels_N[part] != IGNORED_LABEL).unsqueeze(1)
            parent_CV = logits(parent_ND[part].detach()).float().log_softmax(-1)
            hidden_CD = hidden_ND[part].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = logits(hidden_CD)
            child_CV = logits_CV.detach().float().log_softmax(-1)
            shares_CV = parent_CV.exp()
            total += (shares_CV * (parent_CV - child_CV) * counts_C1).sum()
            if grad_ND is not None:
                # d loss / d logits = softmax of the child - softmax of the parent
                grad_CV = child_CV.exp_().sub_(shares_CV).mul_(counts_C1)
                (grad_ND[part],) = torch.autograd.grad(logits_CV, [hidden_CD], grad_CV.to(logits_CV.dtype))
        ctx.save_for_backward(*([] if grad_ND is None else [grad_ND]))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return None, None, None, None, None
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None, None, None
