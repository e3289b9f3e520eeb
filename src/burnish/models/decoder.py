"""The one decoder: embeddings, blocks, output layer, all steered by `ModelConfig` fields.

It knows neither adapters nor quantizers (they replace its linears, see `linears.py`) nor a KV cache (an `Attention`
is an argument of forward).

Shapes: B sequences, T tokens, D hidden, H query heads, K kv heads, E head dim, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.models.attention import Attention, AttentionSpec, FullCausal, spec_of_layer
from burnish.models.config import ModelConfig
from burnish.models.recompute import recompute
from burnish.models.rope import RopeTable, ropes_of

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class RMSNorm(nn.Module):
    """Root mean square norm; statistics in float32, rounded to x's dtype before the weight as the models were trained.

    Zhang and Sennrich, 2019, arXiv:1910.07467. With a weight offset the weight is applied in float32 as well.
    """

    def __init__(
        self, width: int, *, eps: float, offset: float, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        width = self.weight.shape
        if self.offset:
            normed = F.rms_norm(x.float(), width, self.weight.float() + self.offset, self.eps)
            return normed.to(x.dtype)
        if x.dtype == torch.float32:
            return F.rms_norm(x, width, self.weight, self.eps)
        return F.rms_norm(x, width, None, self.eps) * self.weight


def _norm(
    config: ModelConfig, width: int, device: torch.device | None, dtype: torch.dtype | None
) -> nn.LayerNorm | RMSNorm:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, device=device, dtype=dtype)
    return RMSNorm(width, eps=config.norm_eps, offset=config.norm_weight_offset, device=device, dtype=dtype)


class SelfAttention(nn.Module):
    """Projections, norms and rotation of one layer; the attention itself is delegated."""

    def __init__(
        self, config: ModelConfig, layer: int, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.spec: AttentionSpec = spec_of_layer(config, layer)
        hidden, query, key = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, query, bias=config.qkv_bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(hidden, key, bias=config.qkv_bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(hidden, key, bias=config.qkv_bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(query, hidden, bias=config.o_bias, device=device, dtype=dtype)
        self.q_norm = _norm(config, config.head_dim, device, dtype) if config.qk_norm else None
        self.k_norm = _norm(config, config.head_dim, device, dtype) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, rope: RopeTable | None, attention: Attention) -> Tensor:
        q_BTHE = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKE = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKE = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if rope is not None:
            q_BTHE, k_BTKE = rope.rotate(q_BTHE), rope.rotate(k_BTKE)
        out_BHTE = attention.attend(
            self.layer, q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2), self.spec
        )
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears and an activation, or three with a gate."""

    def __init__(self, config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = _ACTIVATIONS[config.activation]
        self.gate_proj = (
            nn.Linear(hidden, inner, bias=bias, device=device, dtype=dtype) if config.mlp == "gated" else None
        )
        self.up_proj = nn.Linear(hidden, inner, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=bias, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x_BTD)))
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One layer: attention and MLP around the residual, in sequence or in parallel."""

    def __init__(
        self, config: ModelConfig, layer: int, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.parallel_residual = config.parallel_residual
        self.residual_from_norm = config.residual_from_norm
        self.input_layernorm = _norm(config, hidden, device, dtype)
        self.self_attn = SelfAttention(config, layer, device=device, dtype=dtype)
        self.post_attention_layernorm = None if config.shared_norm else _norm(config, hidden, device, dtype)
        self.mlp = MLP(config, device=device, dtype=dtype)
        self.attention_output_norm = _norm(config, hidden, device, dtype) if config.output_norms else None
        self.mlp_output_norm = _norm(config, hidden, device, dtype) if config.output_norms else None

    def forward(self, x_BTD: Tensor, rope: RopeTable | None, attention: Attention) -> Tensor:
        normed_BTD = self.input_layernorm(x_BTD)
        attended_BTD = self.self_attn(normed_BTD, rope, attention)
        if self.attention_output_norm is not None:
            attended_BTD = self.attention_output_norm(attended_BTD)
        if self.parallel_residual:
            norm = self.post_attention_layernorm
            return self.mlp(normed_BTD if norm is None else norm(x_BTD)) + attended_BTD + x_BTD
        x_BTD = (normed_BTD if self.residual_from_norm else x_BTD) + attended_BTD
        assert self.post_attention_layernorm is not None
        normed_BTD = self.post_attention_layernorm(x_BTD)
        out_BTD = self.mlp(normed_BTD)
        if self.mlp_output_norm is not None:
            out_BTD = self.mlp_output_norm(out_BTD)
        return (normed_BTD if self.residual_from_norm else x_BTD) + out_BTD


def _embedding(rows: int, width: int, device: torch.device | None, dtype: torch.dtype | None) -> nn.Embedding:
    if device is None or device.type != "meta":
        return nn.Embedding(rows, width, device=device, dtype=dtype)
    # nn.Embedding draws its weight, for which torch on the meta device first imports its compiler: most of a second.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width, device=device, dtype=dtype))


class Trunk(nn.Module):
    """Everything below the output layer, under the canonical prefix `model`."""

    def __init__(self, config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_tokens = _embedding(config.vocab_size, hidden, device, dtype)
        self.embed_positions = (
            _embedding(config.max_position_embeddings, hidden, device, dtype) if config.position == "learned" else None
        )
        self.embed_norm = _norm(config, hidden, device, dtype) if config.embedding_norm else None
        self.layers = nn.ModuleList(
            Block(config, layer, device=device, dtype=dtype) for layer in range(config.num_layers)
        )
        self.norm = _norm(config, hidden, device, dtype)


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: what to build; kept as `.config`.
        device: where the parameters live; "meta" builds without memory.
        dtype: of every parameter; float32 when None.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their activations; takes effect
            only while training. An `Attention` then has to keep nothing.
        checkpoint_every: of those, every so many-th block only; 1 is every block.
        recompute: what does so, called with the block and its arguments.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        place = None if device is None else torch.device(device)
        self.config = config
        self.gradient_checkpointing = False
        self.checkpoint_every = 1
        self.recompute: Callable[..., Tensor] = recompute
        self.model = Trunk(config, device=place, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias, device=place, dtype=dtype)
        )
        self._ropes = ropes_of(config)

    @property
    def device(self) -> torch.device:
        """Where the embeddings live."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The embeddings' dtype, in which activations are computed."""
        return self.model.embed_tokens.weight.dtype

    @property
    def needs_lengths(self) -> bool:
        """Whether rotations depend on the length of the sequence; see `Rope.table`."""
        return self._ropes is not None and any(rope.needs_length for rope in self._ropes)

    def initialize(self, *, std: float = 0.02, seed: int = 0) -> Decoder:
        """Draw every weight anew, in place: normal linears and embeddings, neutral norms, zero biases.

        Linears that write into the residual start smaller by sqrt(2 * num_layers), as in GPT-2 (Radford et al., 2019).
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)
        depth = (2 * self.config.num_layers) ** 0.5
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    spread = std / depth if name.endswith(("o_proj", "down_proj")) else std
                    module.weight.normal_(0.0, spread, generator=generator)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
                elif isinstance(module, RMSNorm):
                    module.weight.fill_(1.0 - module.offset)
        return self

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, attention: Attention | None = None
    ) -> Tensor:
        """Logits of the next token after each token given.

        Args:
            tokens_BT: (B, T) integer token ids.
            positions_BT: (B, T), (1, T) or (T,) where the tokens stand in their sequences; 0..T-1 when None.
            attention: keeps keys and values of earlier calls; None attends to the T tokens given only.

        Returns:
            (B, T, V) in the model's dtype.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT=positions_BT, attention=attention))

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        attention: Attention | None = None,
        lengths_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D); arguments as in `forward`.

        Args:
            lengths_BT: see `Rope.table`; needed where tokens of several sequences share a row.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        elif positions_BT.dim() == 1:
            positions_BT = positions_BT[None]
        x_BTD = self.embed(tokens_BT, positions_BT)
        if self.model.embed_norm is not None:
            x_BTD = self.model.embed_norm(x_BTD)
        x_BTD = self.run_blocks(
            x_BTD, positions_BT, attention=FullCausal() if attention is None else attention, lengths_BT=lengths_BT
        )
        return self.model.norm(x_BTD)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings, scaled, and learned positions: (B, T, D), before their norm."""
        trunk = self.model
        x_BTD = trunk.embed_tokens(tokens_BT)
        if self.config.embedding_scale != 1.0:
            x_BTD = x_BTD * torch.tensor(self.config.embedding_scale, dtype=x_BTD.dtype, device=x_BTD.device)
        return x_BTD if trunk.embed_positions is None else x_BTD + trunk.embed_positions(positions_BT)

    def run_blocks(
        self, x_BTD: Tensor, positions_BT: Tensor, *, attention: Attention, lengths_BT: Tensor | None = None
    ) -> Tensor:
        """All blocks, one after the other; arguments as in `hidden`."""
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        tables = self.rope_tables(positions_BT, x_BTD.dtype, lengths_BT)
        for layer, block in enumerate(self.model.layers):
            rope = None if tables is None else tables[self.config.window(layer) is not None]
            if checkpointed and layer % self.checkpoint_every == 0:
                x_BTD = self.recompute(block, x_BTD, rope, attention)
            else:
                x_BTD = block(x_BTD, rope, attention)
        return x_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Output layer on any (..., D) hidden states: (..., V)."""
        head = self.lm_head
        logits = F.linear(hidden, self.model.embed_tokens.weight) if head is None else head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def rope_tables(
        self, positions_BT: Tensor, dtype: torch.dtype, lengths_BT: Tensor | None
    ) -> tuple[RopeTable, RopeTable] | None:
        """The rotations of layers without and with a window at these positions; None without rotary positions."""
        if self._ropes is None:
            return None
        main, local = self._ropes
        table = main.table(positions_BT, dtype=dtype, lengths_BT=lengths_BT)
        return table, table if local is main else local.table(positions_BT, dtype=dtype, lengths_BT=lengths_BT)
