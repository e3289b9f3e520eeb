"""A block's forward and backward written out by hand: two autograd nodes a block, and little kept between them.

A half is "norm, linears, attention or activation, linear, plus residual". It keeps its input, the norm's statistics,
what the first linears gave, and for attention its output; everything else is computed again on the way back. Blocks
that are put together otherwise (`can_fuse`) run through the decoder's own forward, with the same results.

N positions, D hidden, H query heads, K kv heads, E head dim, I intermediate, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.kernels.cpu.training import NormKind, TrainingKernels
from burnish.models.attention import AttentionSpec
from burnish.models.decoder import Block, RMSNorm
from burnish.models.rope import RopeTable
from burnish.train.compiled_attention import score_options
from burnish.train.linear_group import LinearGroup


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """A norm module as the kernels take it."""

    module: nn.Module
    kind: NormKind
    eps: float
    offset: float

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        if isinstance(module, RMSNorm):
            return cls(module=module, kind="rmsnorm", eps=module.eps, offset=module.offset)
        assert isinstance(module, nn.LayerNorm)
        return cls(module=module, kind="layernorm", eps=module.eps, offset=0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained ones: weight, then bias."""
        found = [self.module.weight, getattr(self.module, "bias", None)]
        return [value for value in found if isinstance(value, nn.Parameter) and value.requires_grad]

    def forward(self, x_ND: Tensor, kernels: TrainingKernels) -> tuple[Tensor, Tensor]:
        """The normed input and (N, 2) statistics."""
        weight, bias = self._tensors
        return kernels.norm_forward(x_ND, weight, bias, kind=self.kind, eps=self.eps, offset=self.offset)

    def again(self, x_ND: Tensor, stats_N2: Tensor, kernels: TrainingKernels) -> Tensor:
        """The normed input once more."""
        weight, bias = self._tensors
        return kernels.norm_again(x_ND, weight, bias, stats_N2, kind=self.kind, offset=self.offset)

    def backward(
        self, grad_ND: Tensor, x_ND: Tensor, stats_N2: Tensor, residual_ND: Tensor | None, kernels: TrainingKernels
    ) -> tuple[Tensor, list[Tensor]]:
        """The input's gradient, `residual_ND` added, and those of `parameters`; overwrites `grad_ND`."""
        weight, _ = self._tensors
        trained = self.parameters
        grad_x_ND, grad_weight, grad_bias = kernels.norm_backward(
            grad_ND, x_ND, weight, stats_N2,
            kind=self.kind, offset=self.offset, grad_residual_ND=residual_ND, out=grad_ND, weight_grads=bool(trained),
        )  # fmt: skip
        of_module = ((self.module.weight, grad_weight), (getattr(self.module, "bias", None), grad_bias))
        pairs = [(value, grad) for value, grad in of_module if grad is not None]
        return grad_x_ND, [grad.to(one.dtype) for one in trained for value, grad in pairs if value is one]

    @property
    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.module, "bias", None)
        return self.module.weight.detach(), None if bias is None else bias.detach()  # type: ignore[union-attr, operator]


class Sequences:
    """What all blocks of one forward share: where rows begin, rotations as the kernels take them, and the kernels.

    Args:
        starts: R + 1 numbers: row r of the packed batch is starts[r] .. starts[r + 1] - 1.
    """

    def __init__(self, starts: Sequence[int], kernels: TrainingKernels) -> None:
        self.starts = torch.tensor(starts, dtype=torch.int32)
        self.kernels = kernels
        self._rotations: dict[int, tuple[RopeTable, Tensor, Tensor]] = {}

    def rotate(self, rope: RopeTable, *heads: Tensor, inverse: bool) -> None:
        """Rotate (N, heads, E) in place."""
        if id(rope) not in self._rotations:
            cos_NF, sin_NF = (table.flatten(0, 2).float().contiguous() for table in (rope.cos, rope.sin))
            self._rotations[id(rope)] = (rope, cos_NF, sin_NF)
        _, cos_NF, sin_NF = self._rotations[id(rope)]
        for x_NHE in heads:
            self.kernels.rotate_(x_NHE, cos_NF, sin_NF, interleaved=rope.interleaved, inverse=inverse)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionHalf:
    """Norm, query/key/value, rotation, attention, output linear.

    Attributes:
        same_residual: the half's input is the residual too.
    """

    norm: Norm
    qkv: LinearGroup
    out: LinearGroup
    spec: AttentionSpec
    head_dim: int
    same_residual: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.norm.parameters, *self.qkv.parameters, *self.out.parameters]

    def __call__(self, x_ND: Tensor, residual_ND: Tensor | None, rope: RopeTable | None, rows: Sequences) -> Tensor:
        return _Attention.apply(x_ND, residual_ND, self, rope, rows, *self.parameters)  # type: ignore[return-value]

    def heads(self, qkv_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, E), keys and values (N, K, E) as views of the joined outputs."""
        width = self.head_dim
        query, key = self.spec.num_heads * width, self.spec.num_kv_heads * width
        parts = qkv_NE[:, : query + 2 * key].split([query, key, key], dim=1)
        q_NHE, k_NKE, v_NKE = (part.unflatten(1, (-1, width)) for part in parts)
        return q_NHE, k_NKE, v_NKE


@dataclass(frozen=True, kw_only=True, eq=False)
class MlpHalf:
    """Norm, up (and gate) linears, activation, down linear."""

    norm: Norm
    up: LinearGroup  # gate first where there is one
    down: LinearGroup
    activation: str
    gated: bool
    same_residual: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.norm.parameters, *self.up.parameters, *self.down.parameters]

    def __call__(self, x_ND: Tensor, residual_ND: Tensor | None, rows: Sequences) -> Tensor:
        return _Mlp.apply(x_ND, residual_ND, self, rows, *self.parameters)  # type: ignore[return-value]

    def activate(self, up_NE: Tensor, kernels: TrainingKernels) -> Tensor:
        """(N, I): the down linear's input."""
        first, second = self._branches(up_NE)
        if second is None:
            return kernels.activation_forward(first, activation=self.activation)
        return kernels.gate_forward(first, second, activation=self.activation)

    def activate_backward(self, grad_NI: Tensor, up_NE: Tensor, grad_up_NE: Tensor, kernels: TrainingKernels) -> Tensor:
        """`activate`'s result again; the gradient of its input goes to the first columns of `grad_up_NE`.

        Overwrites `grad_NI`.
        """
        first, second = self._branches(up_NE)
        grad_first, grad_second = self._branches(grad_up_NE)
        if second is None or grad_second is None:
            kernels.activation_backward(grad_NI, first, activation=self.activation, out=grad_first)
            return kernels.activation_forward(first, activation=self.activation, out=grad_NI)
        kernels.gate_backward(
            grad_NI,
            first,
            second,
            activation=self.activation,
            grad_gate_NI=grad_first,
            grad_up_NI=grad_second,
            product_NI=grad_NI,
        )
        return grad_NI

    def _branches(self, up_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the activation is applied to, and what it is multiplied with."""
        width = self.down.num_inputs
        return (up_NE[:, :width], up_NE[:, width : 2 * width]) if self.gated else (up_NE[:, :width], None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        residual_ND: Tensor | None,
        half: AttentionHalf,
        rope: RopeTable | None,
        rows: Sequences,
        *parameters: Tensor,
    ) -> Tensor:
        kernels = rows.kernels
        normed_ND, stats_N2 = half.norm.forward(x_ND, kernels)
        qkv_NE = half.qkv.forward(normed_ND)
        del normed_ND
        q_NHE, k_NKE, v_NKE = half.heads(qkv_NE)
        if rope is not None:
            rows.rotate(rope, q_NHE, k_NKE, inverse=False)
        attended_NHE, lse_NH = kernels.attention_forward(q_NHE, k_NKE, v_NKE, rows.starts, **score_options(half.spec))
        out_NE = half.out.forward(attended_NHE.flatten(1))
        hidden_size = half.out.num_outputs
        base_ND = x_ND if residual_ND is None else residual_ND
        ctx.half, ctx.rope, ctx.rows = half, rope, rows
        # A copy, so that the wide matrix does not live as long as its few last columns.
        low_NR = out_NE[:, hidden_size:].clone()
        ctx.save_for_backward(x_ND, stats_N2, qkv_NE, attended_NHE, lse_NH, low_NR)
        return torch.add(out_NE[:, :hidden_size], base_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half, rope, rows = ctx.half, ctx.rope, ctx.rows
        kernels = rows.kernels
        x_ND, stats_N2, qkv_NE, attended_NHE, lse_NH, low_NR = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        wide_NE = _with_room(grad_ND, half.out)
        grad_attended = half.out.backward_input(wide_NE)
        out_grads = half.out.backward_weights(wide_NE, attended_NHE.flatten(1), low_NR)
        del wide_NE
        q_NHE, k_NKE, v_NKE = half.heads(qkv_NE)
        grad_qkv_NE = torch.empty_like(qkv_NE)
        grad_q_NHE, grad_k_NKE, grad_v_NKE = half.heads(grad_qkv_NE)
        kernels.attention_backward(
            grad_attended.view_as(attended_NHE), q_NHE, k_NKE, v_NKE, attended_NHE, lse_NH, rows.starts,
            **score_options(half.spec), grad_q_NHE=grad_q_NHE, grad_k_NKE=grad_k_NKE, grad_v_NKE=grad_v_NKE,
        )  # fmt: skip
        if rope is not None:
            rows.rotate(rope, grad_q_NHE, grad_k_NKE, inverse=True)
        grad_normed = half.qkv.backward_input(grad_qkv_NE)
        normed_ND = half.norm.again(x_ND, stats_N2, kernels)
        qkv_grads = half.qkv.backward_weights(grad_qkv_NE, normed_ND, qkv_NE[:, half.qkv.num_outputs :])
        del normed_ND
        grad_x, norm_grads = half.norm.backward(
            grad_normed, x_ND, stats_N2, grad_ND if half.same_residual else None, kernels
        )
        residual = None if half.same_residual else grad_ND
        return grad_x, residual, None, None, None, *norm_grads, *qkv_grads, *out_grads


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, residual_ND: Tensor | None, half: MlpHalf, rows: Sequences, *parameters: Tensor
    ) -> Tensor:
        kernels = rows.kernels
        normed_ND, stats_N2 = half.norm.forward(x_ND, kernels)
        up_NE = half.up.forward(normed_ND)
        del normed_ND
        product_NI = half.activate(up_NE, kernels)
        out_NE = half.down.forward(product_NI)
        hidden_size = half.down.num_outputs
        ctx.half, ctx.rows = half, rows
        ctx.save_for_backward(x_ND, stats_N2, up_NE, out_NE[:, hidden_size:].clone())
        return torch.add(out_NE[:, :hidden_size], x_ND if residual_ND is None else residual_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        half, rows = ctx.half, ctx.rows
        kernels = rows.kernels
        x_ND, stats_N2, up_NE, low_NR = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        wide_NE = _with_room(grad_ND, half.down)
        grad_product = half.down.backward_input(wide_NE)
        grad_up_NE = torch.empty_like(up_NE)
        product_NI = half.activate_backward(grad_product, up_NE, grad_up_NE, kernels)
        del grad_product
        down_grads = half.down.backward_weights(wide_NE, product_NI, low_NR)
        del product_NI, wide_NE
        grad_normed = half.up.backward_input(grad_up_NE)
        normed_ND = half.norm.again(x_ND, stats_N2, kernels)
        up_grads = half.up.backward_weights(grad_up_NE, normed_ND, up_NE[:, half.up.num_outputs :])
        del normed_ND
        grad_x, norm_grads = half.norm.backward(
            grad_normed, x_ND, stats_N2, grad_ND if half.same_residual else None, kernels
        )
        residual = None if half.same_residual else grad_ND
        return grad_x, residual, None, None, *norm_grads, *up_grads, *down_grads


def _with_room(grad_NO: Tensor, group: LinearGroup) -> Tensor:
    """The gradient of a group's outputs with the columns that its adapters' gradients take."""
    if not group.num_ranks:
        return grad_NO
    wide_NE = grad_NO.new_empty(len(grad_NO), group.width)
    wide_NE[:, : group.num_outputs].copy_(grad_NO)
    return wide_NE


def can_fuse(block: Block) -> bool:
    """Whether the two halves compute this block: no norms of outputs, queries or keys, plain scores, no dropout."""
    attention = block.self_attn
    return (
        block.attention_output_norm is None
        and block.mlp_output_norm is None
        and not block.residual_from_norm
        and attention.q_norm is None
        and attention.spec.softcap is None
        and not attention.spec.alibi_bfloat16
    )
