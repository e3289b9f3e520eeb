"""The kernels in plain torch: what runs without a compiler, and what the compiled ones are held against.

Sums of products are taken in float64 where a compiled kernel is free in their order, so that a difference is the
kernel's own. Nothing here is fast.

Shapes: M rows of activations, N output features, K input features, G groups of input features that share a scale,
T query tokens, S tokens of the sequence, H query heads, J kv heads, E head dim, F rotated frequencies, P places of a
block, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
EXACT_FLOAT32 = (1 << 24) // (LARGEST * LARGEST)
"""Input features whose products, summed in float32 in any order, are exact integers."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""Hendrycks and Gimpel, 2016, arXiv:1606.08415 (gelu, its approximations, silu)."""


# ---- linears ---------------------------------------------------------------------------------------------------------


def linear_float(x_MK: Tensor, weight_NK: Tensor, *, bias_N: Tensor | None = None) -> Tensor:
    """x W' + b, (M, N) float32; activations are rounded to bfloat16 first where the weight is bfloat16."""
    y_MN = x_MK.to(weight_NK.dtype).double() @ weight_NK.double().t()
    return _with_bias(y_MN, bias_N)


def quantize_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits by its largest magnitude, half to even.

    Args:
        x_MK: any float dtype.

    Returns:
        Integers (M, K), int8, and scales (M,), float32: NaN, with integers of 0, for a row that holds NaN or
        infinities. The compiled kernels multiply by 127 / max where this divides by max / 127: halves that float32
        does not hold exactly may go the other way.
    """
    x_MK = x_MK.float()
    scale_M = x_MK.abs().amax(dim=1) / LARGEST
    finite_M = torch.isfinite(scale_M)
    scale_M = torch.where(finite_M, scale_M, torch.nan)
    step_M = torch.where(scale_M > 0, scale_M, 1.0)
    ints_MK = (x_MK / step_M[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return torch.where(finite_M[:, None], ints_MK, 0.0).to(torch.int8), scale_M


def integer_product(ints_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """The exact sums of int8 products, (M, N), rounded once to float32."""
    # With one input feature torch 2.13's integer product on the CPU reads past its operands.
    if ints_MK.device.type == "cpu" and ints_MK.shape[1] > 1:
        return torch._int_mm(ints_MK, weight_NK.t()).float()  # pyright: ignore[reportPrivateImportUsage]
    # The GPU's integer product takes more than 16 rows and multiples of 8 only.
    if ints_MK.shape[0] > 16 and weight_NK.shape[0] % 8 == 0 and weight_NK.shape[1] % 8 == 0:
        return torch._int_mm(ints_MK, weight_NK.t()).float()  # pyright: ignore[reportPrivateImportUsage]
    dtype = torch.float32 if weight_NK.shape[1] <= EXACT_FLOAT32 else torch.float64
    return (ints_MK.to(dtype) @ weight_NK.t().to(dtype)).float()


def linear_int8(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor, *, bias_N: Tensor | None = None) -> Tensor:
    """x W' + b, (M, N) float32, from an int8 weight with a scale per output feature and activations of 8 bits per row.

    Dettmers et al., 2022, arXiv:2208.07339 (vector-wise quantization), without outliers in 16 bits.
    """
    ints_MK, scale_M = quantize_activations(x_MK)
    y_MN = integer_product(ints_MK, weight_NK) * scale_N * scale_M[:, None]
    return y_MN if bias_N is None else y_MN + bias_N.float()


def linear_grouped(
    x_MK: Tensor,
    ints_NK: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    *,
    group_size: int,
    order_K: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    """x W' + b, (M, N) float32, from unsigned integers with a scale and a zero point per group.

    The activations are rounded to 8 bits per row, as in `linear_int8`.

    Args:
        ints_NK: uint8, columns sorted by group.
        scales_NG: float16.
        zeros_NG: uint8.
        group_size: input features per group, the last one may be short; -1 is all of them.
        order_K: column j of `ints_NK` belongs to input feature order_K[j]; None where they agree.
    """
    x_MK = x_MK if order_K is None else x_MK[:, order_K.long()]
    ints_MK, scale_M = quantize_activations(x_MK)
    groups_K = _groups_of_columns(ints_NK.shape[1], group_size)
    centred_NK = ints_NK.double() - zeros_NG.double()[:, groups_K]
    y_MN = ints_MK.double() @ (centred_NK * scales_NG.double()[:, groups_K]).t()
    return _with_bias(y_MN * scale_M.double()[:, None], bias_N)


def requantized(ints_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """A grouped weight as int8 with one scale per output feature, as matrix units without groups take it.

    Returns:
        Integers (N, K), int8, and scales (N,), float32, for `linear_int8`.
    """
    groups_K = _groups_of_columns(ints_NK.shape[1], group_size)
    centred_NK = ints_NK.float() - zeros_NG.float()[:, groups_K]
    scale_N = (centred_NK * scales_NG.float()[:, groups_K]).abs().amax(dim=1) / LARGEST
    ratio_NG = scales_NG.float() * torch.where(scale_N > 0, 1.0 / scale_N, 0.0)[:, None]
    return (centred_NK * ratio_NG[:, groups_K]).round_().to(torch.int8), scale_N


# ---- what follows a product ------------------------------------------------------------------------------------------


def gated(gate_MN: Tensor, up_MN: Tensor, *, activation: str) -> Tensor:
    """act(gate) * up. Shazeer, 2020, arXiv:2002.05202."""
    return ACTIVATIONS[activation](gate_MN) * up_MN


def softcapped(x: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x / softcap); x itself where softcap is 0. Gemma Team, 2024, arXiv:2408.00118."""
    return x if softcap == 0.0 else torch.tanh(x / softcap) * softcap


def arg_max(logits_MN: Tensor) -> Tensor:
    """(M,) int64: where each row is largest, the lowest index among equals; -1 where the row holds a NaN."""
    is_best_MN = logits_MN == logits_MN.amax(dim=1, keepdim=True)
    ids_M = is_best_MN.to(torch.uint8).argmax(dim=1)
    return ids_M.masked_fill(logits_MN.isnan().any(dim=1), -1)


# ---- rows ------------------------------------------------------------------------------------------------------------


def rms_norm(x_MK: Tensor, weight_K: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, float32. Zhang and Sennrich, 2019, arXiv:1910.07467."""
    x_MK = x_MK.float()
    return x_MK * torch.rsqrt((x_MK * x_MK).mean(dim=-1, keepdim=True) + eps) * weight_K.float()


def layer_norm(x_MK: Tensor, weight_K: Tensor, bias_K: Tensor, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, float32. Ba et al., 2016, arXiv:1607.06450."""
    x_MK = x_MK.float()
    centred_MK = x_MK - x_MK.mean(dim=-1, keepdim=True)
    factor_M1 = torch.rsqrt((centred_MK * centred_MK).mean(dim=-1, keepdim=True) + eps)
    return centred_MK * factor_M1 * weight_K.float() + bias_K.float()


def rotate(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first 2 F features of every head by the angles of its token; the others pass through.

    Su et al., 2021, arXiv:2104.09864.

    Args:
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, F), (1, F + 1), ...
    """
    pairs = cos_TF.shape[-1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    out_THE = x_THE.clone()
    out_THE[..., first] = x_THE[..., first] * cos_T1F - x_THE[..., second] * sin_T1F
    out_THE[..., second] = x_THE[..., second] * cos_T1F + x_THE[..., first] * sin_T1F
    return out_THE


# ---- attention -------------------------------------------------------------------------------------------------------


def cached(x_TJE: Tensor, kv_dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of this dtype gives them back, float32; int8 has a scale per token and head."""
    if kv_dtype != torch.int8:
        return x_TJE.to(kv_dtype).float()
    ints, scales = quantize_activations(x_TJE.flatten(0, 1))
    return (ints.float() * scales[:, None]).view(x_TJE.shape)


def gather_blocks(blocks_BPJE: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence from a paged cache, (S, J, E); freed blocks (-1) read as zeros.

    Kwon et al., 2023, arXiv:2309.06180.

    Args:
        table: block ids of the sequence.
    """
    picked = blocks_BPJE[table.long().clamp_min(0)].masked_fill((table < 0)[:, None, None, None], 0.0)
    return picked.flatten(0, 1)[:length]


def attention(
    q_THE: Tensor,
    k_SJE: Tensor,
    v_SJE: Tensor,
    positions_T: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_HTS: Tensor | None = None,
) -> Tensor:
    """Causal attention of the queries at `positions_T` over the keys of their sequence; (T, H, E) float32.

    Vaswani et al., 2017, arXiv:1706.03762; H / J query heads share a kv head (Ainslie et al., 2023, arXiv:2305.13245).

    Args:
        window: a query sees itself and the `window - 1` tokens before it; None sees all of them.
        softcap: see `softcapped`; on the scaled scores, before the bias.
        alibi_HTS: added to the scores (see `alibi_bias`).
    """
    share = q_THE.shape[1] // k_SJE.shape[1]
    q_HTE = q_THE.double().transpose(0, 1)
    k_HSE = k_SJE.double().repeat_interleave(share, dim=1).transpose(0, 1)
    v_HSE = v_SJE.double().repeat_interleave(share, dim=1).transpose(0, 1)
    scores_HTS = softcapped(q_HTE @ k_HSE.transpose(1, 2) * scale, softcap)
    if alibi_HTS is not None:
        scores_HTS = scores_HTS + alibi_HTS
    distance_TS = positions_T[:, None] - torch.arange(k_SJE.shape[0])
    hidden_TS = (distance_TS < 0) | (distance_TS >= (window or k_SJE.shape[0] + 1))
    weights_HTS = torch.softmax(scores_HTS.masked_fill(hidden_TS, -torch.inf), dim=-1)
    return (weights_HTS @ v_HSE).transpose(0, 1).float()


def alibi_bias(
    slopes_H: Tensor, positions_T: Tensor, length: int, *, scale: float = 1.0, bfloat16: bool = False
) -> Tensor:
    """(H, T, S) float32: falls linearly with distance, 0 at the query's own position. Press et al., 2021,
    arXiv:2108.12409.

    Args:
        scale: multiplies the bias.
        bfloat16: slopes, positions and their products are rounded to bfloat16.
    """
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    slopes_H1 = slopes_H.to(dtype)[:, None]
    query_HT = (slopes_H1 * positions_T.to(dtype)).float() * scale
    key_HS = (slopes_H1 * torch.arange(length).to(dtype)).float() * scale
    return key_HS[:, None, :] - query_HT[:, :, None]


def _groups_of_columns(num_inputs: int, group_size: int) -> Tensor:
    return torch.arange(num_inputs) // (num_inputs if group_size == -1 else group_size)


def _with_bias(y_MN: Tensor, bias_N: Tensor | None) -> Tensor:
    return (y_MN if bias_N is None else y_MN + bias_N.double()).float()
