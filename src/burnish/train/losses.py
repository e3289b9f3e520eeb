"""Cross-entropy of the next token, computed only where a label asks for it.

Logits over the whole vocabulary exist for one chunk of labelled positions at a time, in the forward pass; the backward
pass only rescales what was kept, so a (tokens, vocabulary) matrix is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# B rows, T tokens, N labelled positions, C positions of one chunk, D hidden, V vocabulary

IGNORED_LABEL = -100
CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk; two such buffers exist at the same time
ROW_STEP = 64  # labelled positions are filled up to a multiple: oneDNN builds and keeps a kernel for every new shape
MIN_CHUNK = 64  # below this many positions the product with the vocabulary is bound by reading the weights


def select_labelled(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Take the hidden states that have a label.

    Args:
        hidden_BTD: final hidden states; position t predicts the label at t.
        labels_BT: int64, `IGNORED_LABEL` where nothing is asked.

    Returns:
        (N, D) hidden states and (N,) labels, rows first.
    """
    flat = labels_BT.reshape(-1)
    places_N = (flat != IGNORED_LABEL).nonzero().squeeze(1)
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, places_N), flat.index_select(0, places_N)


def masked_cross_entropy(
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    *,
    logits: Callable[[Tensor], Tensor],
    vocab_size: int,
    head_parameters: Sequence[Tensor] = (),
    chunk_positions: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy over labelled positions, in nats, as a float32 scalar.

    The sum, not the mean, so that micro-batches add up to the large batch: divide by the labels of the whole step.

    Args:
        hidden_BTD: final hidden states, any float dtype.
        labels_BT: label of each position (already shifted), `IGNORED_LABEL` where there is none.
        logits: maps (C, D) hidden states to (C, V) logits.
        vocab_size: V, to size the chunks.
        head_parameters: trainable tensors that `logits` uses; they get gradients. Others do not.
        chunk_positions: positions per chunk; by default as many as `CHUNK_BYTES` allows.
    """
    hidden_ND, labels_N = select_labelled(hidden_BTD, labels_BT)
    chunk = chunk_positions or max(MIN_CHUNK, CHUNK_BYTES // (4 * vocab_size))
    missing = -len(labels_N) % min(ROW_STEP, chunk)
    hidden_ND, labels_N = F.pad(hidden_ND, (0, 0, 0, missing)), F.pad(labels_N, (0, missing), value=IGNORED_LABEL)
    return _ChunkedCrossEntropy.apply(hidden_ND, labels_N, logits, chunk, *head_parameters)  # type: ignore[return-value]


def used_by_head(logits: Callable[[Tensor], Tensor], hidden_1D: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Which of `parameters` the output head depends on (a tied embedding counts), found by a one-row probe."""
    if not parameters:
        return []
    with torch.enable_grad():
        total = logits(hidden_1D.detach().requires_grad_()).float().sum()
        grads = torch.autograd.grad(total, list(parameters), allow_unused=True)
    return [parameter for parameter, grad in zip(parameters, grads) if grad is not None]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        labels_N: Tensor,
        logits: Callable[[Tensor], Tensor],
        chunk: int,
        *head_parameters: Tensor,
    ) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        head_grads = [torch.zeros_like(parameter) for parameter in head_parameters]
        for start in range(0, len(labels_N), chunk):
            labels_C = labels_N[start : start + chunk].unsqueeze(1)
            counts_C = labels_C != IGNORED_LABEL
            labels_C = labels_C.clamp_min(0)
            hidden_CD = hidden_ND[start : start + chunk].detach().requires_grad_(wants_hidden)
            inputs = [hidden_CD, *head_parameters] if wants_hidden else list(head_parameters)
            with torch.set_grad_enabled(bool(inputs)):
                logits_CV = logits(hidden_CD)
            scores_CV = logits_CV.detach().float()
            lse_C = torch.logsumexp(scores_CV, dim=1, keepdim=True)
            total += ((lse_C - scores_CV.gather(1, labels_C)) * counts_C).sum()
            if not inputs:
                continue
            # d loss / d logits = softmax - one-hot, written over one fresh buffer
            grad_CV = torch.sub(scores_CV, lse_C).exp_()
            grad_CV.scatter_add_(1, labels_C, torch.full_like(lse_C, -1.0))
            grad_CV *= counts_C
            grads = torch.autograd.grad(logits_CV, inputs, grad_CV.to(logits_CV.dtype))
            if grad_hidden_ND is not None:
                grad_hidden_ND[start : start + chunk] = grads[0]
                grads = grads[1:]
            for kept, grad in zip(head_grads, grads):
                kept += grad
        ctx.has_hidden = wants_hidden
        ctx.save_for_backward(*([grad_hidden_ND] if grad_hidden_ND is not None else []), *head_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0]
        scaled = [grad * factor.to(grad.dtype) for grad in ctx.saved_tensors]
        grad_hidden = scaled.pop(0) if ctx.has_hidden else None
        return grad_hidden, None, None, None, *scaled
