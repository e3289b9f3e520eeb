"""Causal attention over packed rows on the compiled kernels, for blocks that run through the decoder's own forward.

It keeps queries, keys, values, the output and one number per position and head. Scores that are bounded, or biased in
bfloat16, and inputs of several dtypes go the way of `PackedCausal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.kernels.cpu.training import TrainingKernels
from burnish.kernels.cpu.training_passes import FORMATS
from burnish.models.attention import AttentionSpec
from burnish.train.packed_attention import PackedCausal

# N positions of all rows, H query heads, K kv heads, T = N, E head dim


class CompiledCausal(PackedCausal):
    """An `Attention` for one packed micro-batch on the CPU.

    Args:
        starts: R + 1 numbers, first position of each row and the end of the last.
    """

    def __init__(self, starts: Sequence[int], *, kernels: TrainingKernels) -> None:
        super().__init__(starts, device=torch.device("cpu"))
        self.starts_R1 = torch.tensor(starts, dtype=torch.int32)
        self.kernels = kernels

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend within each row; B is 1. See `Attention.attend`."""
        alike = q_BHTE.dtype in FORMATS and q_BHTE.dtype == k_BKTE.dtype == v_BKTE.dtype
        if not alike or spec.softcap is not None or spec.alibi_bfloat16:
            return super().attend(layer, q_BHTE, k_BKTE, v_BKTE, spec)
        heads = (x[0].transpose(0, 1).contiguous() for x in (q_BHTE, k_BKTE, v_BKTE))
        out_NHE: Tensor = _Attend.apply(*heads, self, score_options(spec))  # pyright: ignore[reportAssignmentType]
        return out_NHE.transpose(0, 1)[None]


def score_options(spec: AttentionSpec) -> dict[str, Any]:
    """How scores are made, as the kernels take it."""
    slopes_H = spec.alibi_slopes_H
    return {
        "scale": spec.scale,
        "window": spec.window,
        "slopes_H": None if slopes_H is None else slopes_H * spec.alibi_scale,
    }


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, rows: CompiledCausal, scores: dict[str, Any]
    ) -> Tensor:
        out_NHE, lse_NH = rows.kernels.attention_forward(q_NHE, k_NKE, v_NKE, rows.starts_R1, **scores)
        ctx.rows, ctx.scores = rows, scores
        ctx.save_for_backward(q_NHE, k_NKE, v_NKE, out_NHE, lse_NH)
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHE, k_NKE, v_NKE, out_NHE, lse_NH = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q_NHE, k_NKE, v_NKE))
        ctx.rows.kernels.attention_backward(
            grads[0].contiguous(), q_NHE, k_NKE, v_NKE, out_NHE, lse_NH, ctx.rows.starts_R1,
            **ctx.scores, grad_q_NHE=grad_q, grad_k_NKE=grad_k, grad_v_NKE=grad_v,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None
