"""The kernels of fine-tuning in plain torch: what runs without a compiler, and what the compiled ones are held against.

Arguments and results are those of `kernels/cpu/training.py`. Written out without torch's gradients, which check them in
the tests. Sums are float32 (attention: float64); results are rounded once, to their inputs' dtype.

Shapes: N tokens (rows), D width, I inner width, H query heads, K kv heads, E head dim, F rotated frequencies, C rows of
logits, V vocabulary, T tokens of one sequence, O out and I in features, P pairs of weights (bytes), B blocks.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from burnish.kernels.reference import ACTIVATIONS, rotate

IGNORED_LABEL = -100
SCALES_PER_BLOCK = 256
REBUILT_AT_ONCE = 1 << 17
"""Weights: in float32 they stay in a core's cache."""


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm_forward(
    x_ND: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, *, kind: str, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """y_ND and stats_N2; Zhang and Sennrich, 2019, arXiv:1910.07467, or Ba et al., 2016, arXiv:1607.06450."""
    x = x_ND.float()
    mean_N = x.mean(dim=1) if kind == "layernorm" else x.new_zeros(x.shape[0])
    variance_N = (x - mean_N[:, None]).square().mean(dim=1)
    stats_N2 = torch.stack([mean_N, torch.rsqrt(variance_N + eps)], dim=1)
    return norm_again(x_ND, weight_D, bias_D, stats_N2, kind=kind, offset=offset), stats_N2


def norm_again(
    x_ND: Tensor, weight_D: Tensor, bias_D: Tensor | None, stats_N2: Tensor, *, kind: str, offset: float = 0.0
) -> Tensor:
    """y_ND from the statistics of `norm_forward`."""
    normed_ND = (x_ND.float() - stats_N2[:, :1]) * stats_N2[:, 1:]
    if kind == "rmsnorm" and offset == 0.0:
        normed_ND = normed_ND.to(x_ND.dtype).float()
    y_ND = normed_ND * (weight_D.float() + offset)
    return (y_ND if bias_D is None else y_ND + bias_D.float()).to(x_ND.dtype)


def norm_backward(
    grad_y_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    stats_N2: Tensor,
    *,
    kind: str,
    offset: float = 0.0,
    grad_residual_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad_x_ND (plus grad_residual_ND), and float32 grad_weight_D and, for a layer norm, grad_bias_D."""
    normed_ND = (x_ND.float() - stats_N2[:, :1]) * stats_N2[:, 1:]
    grad_y = grad_y_ND.float()
    grad_ND = grad_y * (weight_D.float() + offset)
    inner_ND = grad_ND - normed_ND * (grad_ND * normed_ND).mean(dim=1, keepdim=True)
    if kind == "layernorm":
        inner_ND = inner_ND - grad_ND.mean(dim=1, keepdim=True)
    grad_x_ND = inner_ND * stats_N2[:, 1:]
    if grad_residual_ND is not None:
        grad_x_ND = grad_x_ND + grad_residual_ND.float()
    grad_bias_D = grad_y.sum(dim=0) if kind == "layernorm" else None
    grad_weight_D = (grad_y * normed_ND.to(x_ND.dtype).float()).sum(dim=0)
    return grad_x_ND.to(x_ND.dtype), grad_weight_D, grad_bias_D


# ---- activations -----------------------------------------------------------------------------------------------------


def gate_forward(gate_NI: Tensor, up_NI: Tensor, *, activation: str) -> Tensor:
    """act(gate) * up, (N, I)."""
    return (ACTIVATIONS[activation](gate_NI.float()) * up_NI.float()).to(gate_NI.dtype)


def gate_backward(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, *, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad_gate_NI, grad_up_NI, and the product again."""
    gate, up, grad = gate_NI.float(), up_NI.float(), grad_NI.float()
    value = ACTIVATIONS[activation](gate)
    slope = derivative(gate, activation=activation)
    return tuple(result.to(gate_NI.dtype) for result in (grad * up * slope, grad * value, value * up))  # type: ignore[return-value]


def activation_forward(x_NI: Tensor, *, activation: str) -> Tensor:
    """act(x), (N, I)."""
    return ACTIVATIONS[activation](x_NI.float()).to(x_NI.dtype)


def activation_backward(grad_NI: Tensor, x_NI: Tensor, *, activation: str) -> Tensor:
    """grad * act'(x), (N, I)."""
    return (grad_NI.float() * derivative(x_NI.float(), activation=activation)).to(x_NI.dtype)


def derivative(x: Tensor, *, activation: str) -> Tensor:
    """act'(x), float32."""
    if activation in ("silu", "quick_gelu"):
        slope = 1.0 if activation == "silu" else 1.702
        share = torch.sigmoid(slope * x)
        return share * (1 + slope * x * (1 - share))
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        # 0.5 (1 + tanh u) is the sigmoid of 2 u, which keeps its digits where tanh comes close to -1.
        twice = 2 * math.sqrt(2 / math.pi)
        share = torch.sigmoid(twice * (x + 0.044715 * x**3))
        return share + x * share * (1 - share) * twice * (1 + 3 * 0.044715 * x * x)
    return (x > 0).float() if activation == "relu" else torch.ones_like(x)


# ---- rotation --------------------------------------------------------------------------------------------------------


def rotate_(
    x_NHE: Tensor, cos_NF: Tensor, sin_NF: Tensor, *, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    """Rotate the first 2 F features of every head in place; see `reference.rotate`."""
    sin_NF = -sin_NF if inverse else sin_NF
    return x_NHE.copy_(rotate(x_NHE.float(), cos_NF.float(), sin_NF.float(), interleaved=interleaved))


# ---- loss ------------------------------------------------------------------------------------------------------------


def cross_entropy_(
    logits_CV: Tensor,
    labels_C: Tensor,
    *,
    softcap: float | None = None,
    grad: bool = True,
    grad_scale: float = 1.0,
) -> float:
    """Sum of the losses in nats; `logits_CV` become their own gradients."""
    capped_CV = logits_CV.float()
    if softcap:
        capped_CV = softcap * torch.tanh(capped_CV / softcap)
    counts_C = labels_C != IGNORED_LABEL
    picked_C1 = labels_C.clamp_min(0)[:, None]
    lse_C1 = torch.logsumexp(capped_CV, dim=1, keepdim=True)
    losses_C = (lse_C1 - capped_CV.gather(1, picked_C1)).squeeze(1).masked_fill(~counts_C, 0.0)
    if grad:
        grad_CV = (capped_CV - lse_C1).exp()
        grad_CV = grad_CV.scatter_add(1, picked_C1, torch.full_like(lse_C1, -1.0)) * grad_scale
        if softcap:
            grad_CV = grad_CV * (1 - (capped_CV / softcap).square())
        logits_CV.copy_(grad_CV.masked_fill(~counts_C[:, None], 0.0))
    return float(losses_C.double().sum())


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    slopes_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each sequence: out_NHE and lse_NH, float32."""
    out_NHE, lse_NH = torch.empty_like(q_NHE), torch.empty(q_NHE.shape[:2])
    for begin, end in _sequences(starts):
        q_HTE, k_HTE, v_HTE = _heads_first(q_NHE[begin:end], k_NKE[begin:end], v_NKE[begin:end])
        scores_HTT = _scores(q_HTE, k_HTE, scale=scale, window=window, slopes_H=slopes_H)
        lse_NH[begin:end] = torch.logsumexp(scores_HTT, dim=-1).t()
        out_NHE[begin:end] = (torch.softmax(scores_HTT, dim=-1) @ v_HTE).transpose(0, 1).to(q_NHE.dtype)
    return out_NHE, lse_NH


def attention_backward(
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
    """Gradients of `attention_forward`, written to the last three."""
    num_kv_heads = k_NKE.shape[1]
    for begin, end in _sequences(starts):
        q_HTE, k_HTE, v_HTE = _heads_first(q_NHE[begin:end], k_NKE[begin:end], v_NKE[begin:end])
        grad_HTE = grad_out_NHE[begin:end].double().transpose(0, 1)
        delta_HT1 = (grad_HTE * out_NHE[begin:end].double().transpose(0, 1)).sum(dim=-1, keepdim=True)
        scores_HTT = _scores(q_HTE, k_HTE, scale=scale, window=window, slopes_H=slopes_H)
        weights_HTT = torch.exp(scores_HTT - lse_NH[begin:end].double().t()[..., None])
        inner_HTT = weights_HTT * (grad_HTE @ v_HTE.transpose(1, 2) - delta_HT1) * scale
        grad_k_HTE, grad_v_HTE = inner_HTT.transpose(1, 2) @ q_HTE, weights_HTT.transpose(1, 2) @ grad_HTE
        grad_q_NHE[begin:end] = (inner_HTT @ k_HTE).transpose(0, 1).to(q_NHE.dtype)
        for target, grad in ((grad_k_NKE, grad_k_HTE), (grad_v_NKE, grad_v_HTE)):
            summed_KTE = grad.unflatten(0, (num_kv_heads, -1)).sum(dim=1)
            target[begin:end] = summed_KTE.transpose(0, 1).to(target.dtype)


def _sequences(starts: Tensor) -> list[tuple[int, int]]:
    places = starts.tolist()
    return [(begin, end) for begin, end in itertools.pairwise(places) if end > begin]


def _heads_first(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    share = q_THE.shape[1] // k_TKE.shape[1]
    k_THE, v_THE = k_TKE.repeat_interleave(share, dim=1), v_TKE.repeat_interleave(share, dim=1)
    return tuple(x.double().transpose(0, 1) for x in (q_THE, k_THE, v_THE))  # type: ignore[return-value]


def _scores(q_HTE: Tensor, k_HTE: Tensor, *, scale: float, window: int | None, slopes_H: Tensor | None) -> Tensor:
    distance_TT = torch.arange(q_HTE.shape[1])[:, None] - torch.arange(q_HTE.shape[1])
    scores_HTT = q_HTE @ k_HTE.transpose(1, 2) * scale
    if slopes_H is not None:
        scores_HTT = scores_HTT - slopes_H.double()[:, None, None] * distance_TT
    return scores_HTT.masked_fill((distance_TT < 0) | (distance_TT >= (window or len(distance_TT) + 1)), -math.inf)


# ---- frozen weights --------------------------------------------------------------------------------------------------


def dequantize_blocks(
    packed_P: Tensor,
    absmax_B: Tensor,
    out_OI: Tensor,
    *,
    levels: tuple[float, ...],
    block_size: int,
    absmax_levels: Tensor | None = None,
    absmax_scale: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Fill `out_OI` with weights of 4 bits in blocks; any device and float dtype. Dettmers et al., 2023,
    arXiv:2305.14314."""
    if absmax_levels is not None and absmax_scale is not None and absmax_offset is not None:
        scale_B = absmax_scale.repeat_interleave(SCALES_PER_BLOCK)[: absmax_B.numel()]
        absmax_B = absmax_levels.index_select(0, absmax_B.int()).mul_(scale_B).add_(absmax_offset)
    whole_OI = out_OI if out_OI.is_contiguous() else torch.empty(out_OI.shape, dtype=out_OI.dtype, device=out_OI.device)
    flat = whole_OI.view(-1)
    total, pairs = flat.numel(), _pairs(levels, packed_P.device)
    slab = max(1, REBUILT_AT_ONCE // block_size) * block_size
    for start in range(0, total, slab):
        end = min(start + slab, total)
        # One look-up gives both weights of a byte: a pair of float32 moves as one 64-bit integer.
        values = pairs.index_select(0, packed_P[start // 2 : -(-end // 2)].long()).view(torch.float32)[: end - start]
        whole = (end - start) // block_size * block_size
        first = start // block_size
        if whole:
            blocks_BN = values[:whole].view(-1, block_size)
            blocks_BN.mul_(absmax_B[first : first + len(blocks_BN), None])
        if whole < end - start:
            values[whole:].mul_(absmax_B[first + whole // block_size])
        flat[start:end].copy_(values)
    return out_OI if whole_OI is out_OI else out_OI.copy_(whole_OI)


def dequantize_rows(codes_OI: Tensor, scale_O: Tensor, out_OI: Tensor) -> Tensor:
    """Fill `out_OI` with weights of 8 bits that have a scale per row; any device and float dtype."""
    rows = max(1, REBUILT_AT_ONCE // max(1, codes_OI.shape[1]))
    for start in range(0, len(codes_OI), rows):
        slab = slice(start, start + rows)
        out_OI[slab] = codes_OI[slab].float().mul_(scale_O[slab, None])
    return out_OI


@lru_cache
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The two levels that a byte stands for, as one 64-bit integer: (256,)."""
    levels_16 = torch.tensor(levels, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([levels_16[byte >> 4], levels_16[byte & 15]], dim=1).view(torch.int64).flatten().to(device)
