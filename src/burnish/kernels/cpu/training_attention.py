"""Attention of fine-tuning on the compiled kernels; see `training.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.kernels.cpu.training_passes import FORMATS, Passes, check_heads, pointer
from burnish.kernels.cpu.training_structs import AttentionPass

# N tokens of all sequences, H query heads, K kv heads, E head dim, R sequences


class AttentionKernels(Passes):
    """Causal attention over sequences that lie end to end."""

    def attention_forward(
        self,
        q_NHE: Tensor,
        k_NKE: Tensor,
        v_NKE: Tensor,
        starts: Tensor,
        *,
        scale: float,
        window: int | None = None,
        slopes_H: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention inside each of R sequences that lie end to end.

        Dao et al., 2022, arXiv:2205.14135. H / K query heads share a kv head (Ainslie et al., 2023, arXiv:2305.13245).

        Args:
            starts: (R + 1,) int32, contiguous: sequence r is rows starts[r] .. starts[r + 1] - 1; they cover 0 .. N.
            scale: multiplies q @ k.
            window: a query sees itself and the `window - 1` tokens before it; None sees all before.
            slopes_H: float32, contiguous: slope * (key's place - query's place) is added to the scaled scores (Press et
                al., 2021, arXiv:2108.12409).

        Returns:
            out_NHE in q's dtype, and lse_NH, float32: log-sum-exp of each query's scores, for the backward pass.
        """
        out_NHE = torch.empty(q_NHE.shape, dtype=q_NHE.dtype) if out is None else out
        lse_NH = torch.empty(q_NHE.shape[:2])
        _check_attention(q_NHE, k_NKE, v_NKE, starts, slopes_H, out_NHE)
        struct = _attention_pass(q_NHE, k_NKE, v_NKE, out_NHE, lse_NH, starts, scale, window, slopes_H)
        self._call("attention_forward", struct)
        return out_NHE, lse_NH

    def attention_backward(
        self,
        grad_out_NHE: Tensor,
        q_NHE: Tensor,
        k_NKE: Tensor,
        v_NKE: Tensor,
        out_NHE: Tensor,
        lse_NH: Tensor,
        starts: Tensor,
        *,
        scale: float,
        window: int | None = None,
        slopes_H: Tensor | None = None,
        grad_q_NHE: Tensor,
        grad_k_NKE: Tensor,
        grad_v_NKE: Tensor,
    ) -> None:
        """Gradients of `attention_forward`, written to the last three, which may be q, k and v themselves."""
        _check_attention(q_NHE, k_NKE, v_NKE, starts, slopes_H, out_NHE, grad_out_NHE, grad_q_NHE)
        check_heads(k_NKE.dtype, k_NKE.shape[0], k_NKE.shape[2], grad_k_NKE, grad_v_NKE)
        assert grad_k_NKE.shape == grad_v_NKE.shape == k_NKE.shape
        assert lse_NH.dtype == torch.float32
        assert lse_NH.is_contiguous()
        assert lse_NH.shape == q_NHE.shape[:2]
        struct = _attention_pass(q_NHE, k_NKE, v_NKE, out_NHE, lse_NH, starts, scale, window, slopes_H)
        struct.grad_out, struct.grad_out_stride = grad_out_NHE.data_ptr(), grad_out_NHE.stride(0)
        struct.grad_q, struct.grad_q_stride = grad_q_NHE.data_ptr(), grad_q_NHE.stride(0)
        struct.grad_k, struct.grad_k_stride = grad_k_NKE.data_ptr(), grad_k_NKE.stride(0)
        struct.grad_v, struct.grad_v_stride = grad_v_NKE.data_ptr(), grad_v_NKE.stride(0)
        self._call("attention_backward", struct)


def _attention_pass(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    out_NHE: Tensor,
    lse_NH: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None,
    slopes_H: Tensor | None,
) -> AttentionPass:
    return AttentionPass(
        format=FORMATS[q_NHE.dtype],
        num_sequences=starts.shape[0] - 1,
        num_heads=q_NHE.shape[1],
        num_kv_heads=k_NKE.shape[1],
        head_dim=q_NHE.shape[2],
        window=window or 0,
        scale=scale,
        starts=starts.data_ptr(),
        slopes=pointer(slopes_H),
        q=q_NHE.data_ptr(),
        k=k_NKE.data_ptr(),
        v=v_NKE.data_ptr(),
        out=out_NHE.data_ptr(),
        lse=lse_NH.data_ptr(),
        q_stride=q_NHE.stride(0),
        k_stride=k_NKE.stride(0),
        v_stride=v_NKE.stride(0),
        out_stride=out_NHE.stride(0),
    )


def _check_attention(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, starts: Tensor, slopes_H: Tensor | None, *like_q: Tensor
) -> None:
    check_heads(q_NHE.dtype, q_NHE.shape[0], q_NHE.shape[2], q_NHE, k_NKE, v_NKE, *like_q)
    assert all(tensor.shape == q_NHE.shape for tensor in like_q)
    assert k_NKE.shape == v_NKE.shape
    assert q_NHE.shape[1] % k_NKE.shape[1] == 0
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert int(starts[0]) == 0
    assert int(starts[-1]) == q_NHE.shape[0]
    if slopes_H is not None:
        assert slopes_H.dtype == torch.float32
        assert slopes_H.is_contiguous()
        assert slopes_H.shape == q_NHE.shape[1:2]
