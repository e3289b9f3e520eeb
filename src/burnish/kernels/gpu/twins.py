"""The kernels' plain torch versions: the arithmetic they have to agree with, and their oracle in the tests.

Shapes as in the files of the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.gpu.grouped_weight import HALF, GroupedWeight


def paged_attention(
    q_THE: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    row_starts: Tensor,
    context_lens_S: Tensor,
    tables_SN: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
    alibi_scale: float = 1.0,
    alibi_bfloat16: bool = False,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Attention of every token over its sequence's places up to itself, in float32: (T, H, E) in q's dtype."""
    block_size, num_kv_heads = keys.shape[1], keys.shape[2]
    out_THE = torch.zeros_like(q_THE)
    for sequence in range(len(context_lens_S)):
        begin, end = int(row_starts[sequence]), int(row_starts[sequence + 1])
        context = int(context_lens_S[sequence])
        for token in range(begin, end):
            position = context - end + token
            first = 0 if window is None else max(0, position - window + 1)
            if position < 0:
                continue
            positions_C = torch.arange(first, position + 1, device=q_THE.device)
            blocks_C = tables_SN[sequence, positions_C // block_size].long()
            k_CKE, v_CKE = (x[blocks_C, positions_C % block_size].float() for x in (keys, values))
            if key_scales is not None and value_scales is not None:
                k_CKE = k_CKE * key_scales[blocks_C, positions_C % block_size][..., None]
                v_CKE = v_CKE * value_scales[blocks_C, positions_C % block_size][..., None]
            q_KRE = q_THE[token].float().unflatten(0, (num_kv_heads, -1))
            scores_KRC = torch.einsum("kre,cke->krc", q_KRE, k_CKE) * scale
            if softcap is not None:
                scores_KRC = softcap * torch.tanh(scores_KRC / softcap)
            if slopes_H is not None:
                key_HC, query_H = slopes_H[:, None] * positions_C, slopes_H * position
                if alibi_bfloat16:
                    key_HC, query_H = key_HC.bfloat16().float(), query_H.bfloat16().float()
                bias_HC = key_HC * alibi_scale - query_H[:, None] * alibi_scale
                scores_KRC = scores_KRC + bias_HC.view_as(scores_KRC)
            out_KRE = torch.einsum("krc,cke->kre", torch.softmax(scores_KRC, dim=-1), v_CKE)
            out_THE[token] = out_KRE.flatten(0, 1).to(q_THE.dtype)
    return out_THE


def rotate(x_TXE: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, interleaved: bool) -> Tensor:
    """The first 2 F dims of every head turned by its token's angles; float32 inside."""
    rotary_dim = 2 * cos_TF.shape[1]
    x, rest = x_TXE[..., :rotary_dim].float(), x_TXE[..., rotary_dim:]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos_TF[:, None].float(), sin_TF[:, None].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    x = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((x.to(x_TXE.dtype), rest), dim=-1)


def weight_only_linear(x_MK: Tensor, weight: GroupedWeight, bias_N: Tensor | None) -> Tensor:
    """x W' + bias in float32, rounded once."""
    weight_NQ = rebuilt(weight)
    x_MQ = weight.arranged(x_MK).float()
    y_MN = x_MQ @ weight_NQ[:, : x_MQ.shape[1]].t()
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(x_MK.dtype)


def rebuilt(weight: GroupedWeight) -> Tensor:
    """The weight as kept, (N, Q) float32."""
    ints_NQ = weight.codes.int()
    if weight.bits == 4:
        chunks = ints_NQ.unflatten(1, (-1, HALF))
        ints_NQ = torch.stack((chunks & 15, chunks >> 4), dim=2).flatten(1)
    groups_Q = torch.arange(weight.num_columns, device=ints_NQ.device) // weight.group_width
    if weight.zeros is not None:
        ints_NQ = ints_NQ - weight.zeros.int().t()[:, groups_Q]
    return ints_NQ.float() * weight.scales.float().t()[:, groups_Q]


def add_rmsnorm(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """See `rows.add_rmsnorm`."""
    sum_TD = x_TD if added_TD is None else x_TD + added_TD
    wide_TD = sum_TD.float()
    wide_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(dim=-1, keepdim=True) + eps)
    if offset:
        return sum_TD, (wide_TD * (weight_D.float() + offset)).to(x_TD.dtype)
    return sum_TD, wide_TD.to(x_TD.dtype) * weight_D


def gated(gate_up_TX: Tensor, *, activation: str) -> Tensor:
    """See `rows.gated`."""
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
    if activation == "gelu_tanh":
        return F.gelu(gate_TI, approximate="tanh") * up_TI
    return (F.silu(gate_TI) if activation == "silu" else F.relu(gate_TI)) * up_TI
