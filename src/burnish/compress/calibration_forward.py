"""A block's forward over calibration tokens: on the compiled kernels where they are, and never computed twice in vain.

What a block computes stands in `models/decoder.py`. Here its norms, rotations, attention and activations are handed to
the compiled passes, while its linears run as they are, hooks and all; and the outputs of the attention and of the
attention's output linear are held on to for as long as the linears before them are known not to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.kernels.cpu.training import TrainingKernels, available
from burnish.models.attention import AttentionSpec, FullCausal
from burnish.models.decoder import MLP, Block, RMSNorm, SelfAttention
from burnish.models.rope import RopeTable

# B sequences of one batch, T tokens of its longest, N = B T, D hidden, H query heads, K kv heads, E head dim,
# F rotated frequencies (of heads: H E), I intermediate

NOTHING, HEADS, OUTPUT = "nothing", "heads", "output"


class KeptAttention:
    """Full causal attention that can hold on to one layer's results for one batch.

    Attributes:
        keep: what is held on to, and answered with, until it is set to something else: NOTHING, what the attention
            gives (HEADS), or what its output linear makes of that (OUTPUT, where the kernels run; else HEADS).
        calls: of the attention.
    """

    def __init__(self) -> None:
        self.keep = NOTHING
        self.calls = 0
        self.heads: Tensor | None = None
        self.output_BTD: Tensor | None = None
        self._rotations: dict[int, tuple[RopeTable, Tensor, Tensor]] = {}

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """As `Attention.attend`."""
        self.calls += 1
        if self.keep != NOTHING and self.heads is not None:
            return self.heads
        # A new one each time, because it would keep its masks: with ALiBi (heads, tokens, tokens) for every length.
        out_BHTE = FullCausal().attend(layer, q_BHTE, k_BKTE, v_BKTE, spec)
        self.heads = out_BHTE if self.keep != NOTHING else None
        return out_BHTE

    def release(self) -> None:
        """Forget all results and stop keeping."""
        self.keep = NOTHING
        self.heads = self.output_BTD = None

    def rotation(self, rope: RopeTable, rows: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (N, F) float32 each, for `rows` sequences."""
        if id(rope) not in self._rotations:
            cos_NF, sin_NF = (
                table.flatten(0, -2).float().repeat(rows // table.shape[0], 1) for table in (rope.cos, rope.sin)
            )
            self._rotations[id(rope)] = (rope, cos_NF, sin_NF)
        _, cos_NF, sin_NF = self._rotations[id(rope)]
        return cos_NF, sin_NF


def run_block(
    block: nn.Module, hidden_BTD: Tensor, rope: RopeTable | None, attention: KeptAttention, *, activation: str
) -> Tensor:
    """What a block makes of hidden states, (B, T, D); without gradients.

    Args:
        activation: of its MLP, by the name in the config.
    """
    if not isinstance(block, Block) or not available(hidden_BTD.device, hidden_BTD.dtype):
        return block(hidden_BTD, rope, attention)
    with _compiled(block, activation, _kernels()):
        return block(hidden_BTD, rope, attention)


@lru_cache
def _kernels() -> TrainingKernels:
    return TrainingKernels()


@contextmanager
def _compiled(block: Block, activation: str, kernels: TrainingKernels) -> Iterator[None]:
    """The block's own modules, but for their linears, computed by the compiled passes meanwhile."""
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in block.modules():
        if isinstance(module, RMSNorm | nn.LayerNorm):
            replaced.append((module, partial(_norm, module, kernels)))
        elif type(module) is MLP:
            replaced.append((module, partial(_mlp, module, activation, kernels)))
        elif type(module) is SelfAttention and _fits(module.spec):
            replaced.append((module, partial(_attention, module, kernels)))
    for module, forward in replaced:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in replaced:
            del module.forward


def _fits(spec: AttentionSpec) -> bool:
    return spec.softcap is None and not spec.alibi_bfloat16


def _norm(norm: RMSNorm | nn.LayerNorm, kernels: TrainingKernels, x: Tensor) -> Tensor:
    rms = isinstance(norm, RMSNorm)
    y_ND, _ = kernels.norm_forward(
        x.reshape(-1, x.shape[-1]),
        norm.weight.detach(),
        None if rms else norm.bias.detach(),
        kind="rmsnorm" if rms else "layernorm",
        eps=norm.eps,
        offset=norm.offset if rms else 0.0,
    )
    return y_ND.view(x.shape)


def _mlp(mlp: MLP, activation: str, kernels: TrainingKernels, x_BTD: Tensor) -> Tensor:
    first_BTI = (mlp.up_proj if mlp.gate_proj is None else mlp.gate_proj)(x_BTD)
    first_NI = first_BTI.flatten(0, 1)
    if mlp.gate_proj is None:
        kernels.activation_forward(first_NI, activation=activation, out=first_NI)
    else:
        kernels.gate_forward(first_NI, mlp.up_proj(x_BTD).flatten(0, 1), activation=activation, out=first_NI)
    return mlp.down_proj(first_BTI)


def _attention(
    module: SelfAttention, kernels: TrainingKernels, x_BTD: Tensor, rope: RopeTable | None, kept: KeptAttention
) -> Tensor:
    if kept.keep == OUTPUT and kept.output_BTD is not None:
        return kept.output_BTD
    heads_BTF = kept.heads if kept.keep != NOTHING else None
    if heads_BTF is None:
        heads_BTF = _heads(module, kernels, x_BTD, rope, kept)
    kept.heads, kept.output_BTD = (heads_BTF if kept.keep == HEADS else None), None
    out_BTD = module.o_proj(heads_BTF)
    if kept.keep == OUTPUT:
        kept.output_BTD = out_BTD
    return out_BTD


def _heads(
    module: SelfAttention, kernels: TrainingKernels, x_BTD: Tensor, rope: RopeTable | None, kept: KeptAttention
) -> Tensor:
    """What the attention gives, (B, T, H E)."""
    rows, tokens = x_BTD.shape[:2]
    q_NHE, k_NKE, v_NKE = (
        linear(x_BTD).flatten(0, 1).unflatten(-1, (-1, module.head_dim))
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    kept.calls += 1
    if module.q_norm is not None and module.k_norm is not None:
        q_NHE, k_NKE = module.q_norm(q_NHE), module.k_norm(k_NKE)
    if rope is not None:
        cos_NF, sin_NF = kept.rotation(rope, rows)
        for x_NHE in (q_NHE, k_NKE):
            kernels.rotate_(x_NHE, cos_NF, sin_NF, interleaved=rope.interleaved)
    spec = module.spec
    slopes_H = None if spec.alibi_slopes_H is None else (spec.alibi_slopes_H * spec.alibi_scale).float().contiguous()
    starts = torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32)
    out_NHE, _ = kernels.attention_forward(
        q_NHE, k_NKE, v_NKE, starts, scale=spec.scale, window=spec.window, slopes_H=slopes_H
    )
    return out_NHE.view(rows, tokens, -1)
