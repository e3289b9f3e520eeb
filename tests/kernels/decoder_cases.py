"""Random decoders of every kind, steps that mix chunks of prompts with single tokens, and their torch twins.

Shapes: T tokens of a step, S sequences, L rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.engine.cpu_backend import CpuBackend, supports
from burnish.engine.step import Backend, StepInputs
from burnish.kernels import reference
from burnish.kernels.cpu.library import CpuLibrary
from burnish.models.attention import AttentionSpec
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 199
MAX_LENGTH = 128
# Scattered blocks of three sequences.
TABLES = [[0, 7, 3, 9], [1, 2, 20, 21], [4, 5, 6, 8]]
# Where each sequence's steps end: a long prompt in chunks beside others' single tokens.
CUTS = [[20, 21, 37], [5], [17, 33, 34, 50]]

_NEOX = {"norm": "layernorm", "mlp": "plain", "qkv_bias": True, "o_bias": True, "mlp_bias": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"num_kv_heads": 4, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "window": {"sliding_window": 10},
    "window of a block": {"sliding_window": 16},
    "local windows": {"layer_windows": (8, None), "local_rope_theta": 500.0},
    "partial rotation, interleaved": {"rotary_dim": 8, "rotary_interleaved": True},
    "partial rotation": {"rotary_dim": 6},
    "parallel, one norm": {**_NEOX, "parallel_residual": True, "shared_norm": True, "activation": "gelu_tanh"},
    "parallel, two norms": {**_NEOX, "parallel_residual": True, "activation": "gelu"},
    "alibi": {
        **_NEOX, "position": "alibi", "rotary_dim": 0, "activation": "gelu_tanh", "embedding_norm": True,
        "tie_word_embeddings": True,
    },
    "alibi in bfloat16, residual from norm": {
        "norm": "layernorm", "mlp": "plain", "position": "alibi", "rotary_dim": 0, "activation": "relu",
        "residual_from_norm": True, "alibi_bfloat16": True, "alibi_scale": 0.28, "num_heads": 6, "num_kv_heads": 3,
    },
    "learned positions": {
        "position": "learned", "rotary_dim": 0, "norm": "layernorm", "mlp": "plain", "activation": "quick_gelu",
        "lm_head_bias": True,
    },
    "query and key norms": {"qk_norm": True},
    "output norms and soft caps": {
        "output_norms": True, "attention_softcap": 5.0, "logit_softcap": 4.0, "embedding_scale": 7.0,
        "norm_weight_offset": 1.0, "activation": "gelu_tanh", "tie_word_embeddings": True, "sliding_window": 20,
    },
    "scores by layer": {"scale_by_layer": True},
    "one kv head": {"num_heads": 6, "num_kv_heads": 1, "head_dim": 8, "rotary_dim": 8},
    "heads of 64": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "rotary_dim": 64},
}  # fmt: skip


def make_decoder(*, dtype: torch.dtype = torch.float32, **fields: Any) -> Decoder:
    """A random decoder whose norms and biases are not neutral."""
    base: dict[str, Any] = {
        "family": "llama", "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 100, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "rotary_dim": 12, "max_position_embeddings": MAX_LENGTH,
    }  # fmt: skip
    decoder = Decoder(ModelConfig(**{**base, **fields}), dtype=dtype).initialize(std=0.2).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return decoder


def make_prompts(lengths: tuple[int, ...] = (37, 5, 50)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def make_step(tokens: list[list[int]], starts: list[int], tables: list[list[int]]) -> StepInputs:
    """A step whose every row's logits are wanted."""
    ends = [start + len(new) for start, new in zip(starts, tokens)]
    tables_SN = np.full((len(tables), max(map(len, tables))), -1, np.int32)
    for row, table in enumerate(tables):
        tables_SN[row, : len(table)] = table
    flat = [token for new in tokens for token in new]
    positions = [position for start, end in zip(starts, ends) for position in range(start, end)]
    return StepInputs(
        tokens_T=np.array(flat, np.int32),
        positions_T=np.array(positions, np.int32),
        row_starts=np.cumsum([0, *map(len, tokens)]).astype(np.int32),
        context_lens_S=np.array(ends, np.int32),
        block_tables_SN=tables_SN,
        logit_rows_L=np.arange(len(flat), dtype=np.int32),
        adapters_S=np.full(len(tokens), -1, np.int32),
        rope_lens_S=np.array(ends, np.int32),
    )


def make_backend(decoder: Decoder, library: CpuLibrary | None, **options: Any) -> CpuBackend:
    settings: dict[str, Any] = {
        "num_blocks": 24, "kv_dtype": torch.float32, "max_model_len": MAX_LENGTH, "threads": 1,
    }  # fmt: skip
    settings.update(options)
    assert supports(decoder, settings["kv_dtype"]) is None
    return CpuBackend(decoder, isa=None if library is None else library.isa, **settings)


def run_chunks(backend: Backend, prompts: list[list[int]]) -> list[Tensor]:
    """Each prompt's logits (T, V), its tokens computed in the steps of `CUTS` beside the others'."""
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for number in range(max(map(len, CUTS))):
        rows = [row for row in range(len(prompts)) if number < len(CUTS[row])]
        tokens = [prompts[row][done[row] : CUTS[row][number]] for row in rows]
        step = make_step(tokens, [done[row] for row in rows], [TABLES[row] for row in rows])
        logits_LV = backend.forward(step, greedy=False).clone()
        ids_L = backend.forward(step, greedy=True)
        assert torch.equal(ids_L, reference.arg_max(logits_LV))
        for row, part in zip(rows, logits_LV.split([len(new) for new in tokens])):
            logits[row].append(part)
            done[row] = CUTS[row][number]
    return [torch.cat(parts) for parts in logits]


class TwinAttention:
    """Attention over keys and values as a cache in `kv_dtype` gives them back, by the torch twins."""

    def __init__(self, kv_dtype: torch.dtype) -> None:
        self.kv_dtype = kv_dtype

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1).float() for x in (q_BHTE, k_BKTE, v_BKTE))
        positions_T = torch.arange(q_THE.shape[0])
        bias = None
        if spec.alibi_slopes_H is not None:
            bias = reference.alibi_bias(
                spec.alibi_slopes_H, positions_T, len(positions_T), scale=spec.alibi_scale, bfloat16=spec.alibi_bfloat16
            )
        out_THE = reference.attention(
            q_THE,
            reference.cached(k_TKE, self.kv_dtype),
            reference.cached(v_TKE, self.kv_dtype),
            positions_T,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap or 0.0,
            alibi_HTS=bias,
        )
        return out_THE.transpose(0, 1)[None].to(q_BHTE.dtype)


@torch.inference_mode()
def worst_error(
    decoder: Decoder, prompts: list[list[int]], logits: list[Tensor], *, kv_dtype: torch.dtype = torch.float32
) -> float:
    """The largest difference from the decoder's own logits, relative to the largest of those."""
    worst = 0.0
    for prompt, got_TV in zip(prompts, logits):
        want_TV = decoder(torch.tensor([prompt]), attention=TwinAttention(kv_dtype)).float()[0]
        worst = max(worst, float((got_TV - want_TV).abs().max() / want_TV.abs().max()))
    return worst
