"""Which blocks of a decoder run fused while it is trained, and the swapping in and out.

`block.forward` is replaced on the module itself, so that whatever is hooked to the module still runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from burnish.kernels.cpu.training import TrainingKernels
from burnish.models.attention import Attention
from burnish.models.decoder import Block, Decoder
from burnish.models.rope import RopeTable
from burnish.train.compiled_attention import CompiledCausal
from burnish.train.fused_block import AttentionHalf, MlpHalf, Norm, Sequences, can_fuse
from burnish.train.linear_group import LinearGroup, WeightScratch
from burnish.train.lora import LoraLinear
from burnish.train.packed_attention import PackedCausal


class FusedCausal(CompiledCausal):
    """Attention over one packed micro-batch: what fused blocks share, and the kernels alone for all others."""

    def __init__(self, starts: Sequence[int], *, kernels: TrainingKernels) -> None:
        super().__init__(starts, kernels=kernels)
        self.rows = Sequences(starts, kernels)


@dataclass(eq=False)
class FusedBlocks:
    """The fused blocks of a model; `refresh` takes over what an update has changed."""

    kernels: TrainingKernels | None = None
    groups: list[LinearGroup] = field(default_factory=list)
    scratch: WeightScratch = field(default_factory=WeightScratch)
    num_blocks: int = 0

    def attention(self, starts: Sequence[int], *, device: torch.device) -> PackedCausal:
        """For one forward of a micro-batch."""
        if self.kernels is None:
            return PackedCausal(starts, device=device)
        return FusedCausal(starts, kernels=self.kernels)

    def refresh(self) -> None:
        for group in self.groups:
            group.refresh()


@contextlib.contextmanager
def fused_blocks(model: nn.Module, *, dtype: torch.dtype, kernels: TrainingKernels | None) -> Iterator[FusedBlocks]:
    """Run every block of `model` that allows it fused, inside this context.

    Args:
        model: a decoder, adapters attached; other models are left alone.
        dtype: what is computed in; the embeddings' outputs are brought to it.
        kernels: None leaves every block as it is.
    """
    fused = FusedBlocks(kernels)
    blocks: list[Block] = []
    try:
        if kernels is not None and isinstance(model, Decoder):
            for block in model.model.layers:
                if isinstance(block, Block) and can_fuse(block) and all(map(_can_join, _linears(block))):
                    _install(block, fused, dtype, kernels, activation=model.config.activation)
                    blocks.append(block)
            fused.num_blocks = len(blocks)
        yield fused
    finally:
        for block in blocks:
            del block.forward


def _install(
    block: Block, fused: FusedBlocks, dtype: torch.dtype, kernels: TrainingKernels, *, activation: str
) -> None:
    attention, mlp = block.self_attn, block.mlp
    parallel = block.parallel_residual
    up = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    qkv, out, ups, down = (
        LinearGroup(linears, dtype=dtype, scratch=fused.scratch)
        for linears in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            up,
            [mlp.down_proj],
        )
    )
    second = block.post_attention_layernorm
    first_half = AttentionHalf(
        norm=Norm.of(block.input_layernorm), qkv=qkv, out=out, spec=attention.spec, head_dim=attention.head_dim
    )
    second_half = MlpHalf(
        norm=Norm.of(block.input_layernorm if second is None else second),
        up=ups,
        down=down,
        activation=activation,
        gated=mlp.gate_proj is not None,
        same_residual=not parallel,
    )
    for group in (qkv, out, ups, down):
        group.join()
        fused.groups.append(group)
    plain = Block.forward.__get__(block)

    def forward(x_BTD: Tensor, rope: RopeTable | None, attention: Attention) -> Tensor:
        if not isinstance(attention, FusedCausal):
            return plain(x_BTD, rope, attention)
        rows = attention.rows
        x_ND = x_BTD[0].to(dtype)
        y_ND = first_half(x_ND, None, rope, rows)
        y_ND = second_half(x_ND, y_ND, rows) if parallel else second_half(y_ND, None, rows)
        return y_ND[None]

    block.forward = forward


def _linears(block: Block) -> list[nn.Module]:
    attention, mlp = block.self_attn, block.mlp
    found: list[nn.Module] = [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]
    return found if mlp.gate_proj is None else [*found, mlp.gate_proj]


def _can_join(linear: nn.Module) -> bool:
    if type(linear) is LoraLinear:
        return not linear.config.dropout and not linear.config.use_dora and _can_join(linear.base)
    return type(linear) is nn.Linear or hasattr(linear, "dequantized")
